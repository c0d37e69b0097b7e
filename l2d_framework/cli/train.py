"""`l2d train`: run files to trained models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2d_framework.cli.config import Overrides, RunFile

if TYPE_CHECKING:
    from rich.table import Table

    from l2d_framework.config import Run


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move an output folder that exists aside and start anew.")
    ] = False,
) -> None:
    """Train the run, or the pipeline of runs, of a file; called again, it goes on where it was interrupted.

    Works under `accelerate launch -m l2d_framework.cli train` and `torchrun -m l2d_framework.cli train`.
    """
    from rich.console import Console

    from l2d_framework.cli.progress import Reporter, progress
    from l2d_framework.config import load_run
    from l2d_framework.training.run import train_runs

    console = Console()
    runs = load_run(run_file, overrides)
    reporters: list[Reporter] = []

    def report(run: Run) -> list[Reporter]:
        reporters.append(progress(console, Path(str(run.output_dir)).name))
        return reporters[-1:]

    try:
        cards = train_runs(runs, overwrite=overwrite, callbacks=report)
    finally:
        for reporter in reporters:
            reporter.close()
    if not leave():
        return
    for run, card in zip(runs, cards, strict=True):
        console.print(summary(f"{run.output_dir}, finished {card['ended']}", card))
        if card["kind"] == "diffusion":
            console.print(
                f'Generate with:  l2d generate {run.output_dir} --prompt "..."', soft_wrap=True, highlight=False
            )


def summary(title: str, card: dict[str, Any]) -> Table:
    """Results of a finished run."""
    from rich import box
    from rich.table import Table

    from l2d_framework.training.metrics import BINS

    result, losses = card["result"], card["result"]["losses"]
    table = Table("", "training", "held out", box=box.SIMPLE_HEAD, title=title)
    names = {"loss": "loss, nats per token", "loss_without_pads": "  without pads"}
    names |= {f"loss_t{i:02d}": f"  t in [{i / BINS:.1f}, {(i + 1) / BINS:.1f})" for i in range(BINS)}
    for key, name in names.items():
        shown = [f"{losses[k]:.4f}" if k in losses else "" for k in (key, f"eval_{key}")]
        if any(shown):
            table.add_row(name, *shown)
    table.add_section()
    table.add_row("updates", f"{result['steps']:,}")
    table.add_row("trained parameters", f"{card['parameters']['trainable']:,}")
    table.add_row("duration", f"{card['seconds']:,.0f} s")
    table.add_row("speed", f"{result['tokens_per_second']:,.0f} tokens/s")
    table.add_row("peak memory", f"{result['peak_memory'] / 2**30:.2f} GiB")
    return table


def leave() -> bool:
    """End what the processes have in common."""
    from accelerate import PartialState

    state = PartialState()
    is_first = bool(state.is_main_process)
    state.destroy_process_group()
    return is_first
