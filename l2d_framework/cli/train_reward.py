"""`l2d train-reward`: preference pairs to a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2d_framework.cli.config import Overrides, RunFile

if TYPE_CHECKING:
    from rich.table import Table


def train_reward(
    run_file: RunFile,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move an output folder that exists aside and start anew.")
    ] = False,
) -> None:
    """Train a reward model with TRL; called again, it goes on from the last checkpoint.

    The run file has `kind: reward`; the result serves `l2d generate --guidance reward_gradient`.
    """
    from rich.console import Console

    from l2d_framework.cli.progress import progress
    from l2d_framework.cli.train import leave
    from l2d_framework.config import load_run
    from l2d_framework.training.reward.run import check_ready
    from l2d_framework.training.reward.run import train_reward as train

    console = Console()
    runs = check_ready(load_run(run_file, overrides), overwrite=overwrite)
    cards = []
    for run in runs:
        reporter = progress(console, Path(str(run.output_dir)).name)
        try:
            cards.append(train(run, overwrite=overwrite, callbacks=[reporter]))
        finally:
            reporter.close()
    if leave():
        for run, card in zip(runs, cards, strict=True):
            console.print(summary(f"{run.output_dir}, finished {card['ended']}", card))


def summary(title: str, card: dict[str, Any]) -> Table:
    """Results of a finished reward run."""
    from rich import box
    from rich.table import Table

    result, splits = card["result"], card["data"]["splits"]
    train, held_out = result["train"], result["held_out"] or {}
    table = Table("", "last training batches", "held out", box=box.SIMPLE_HEAD, title=title)
    table.add_row("pairs", *(f"{splits[which]['pairs']:,}" if which in splits else "" for which in ("train", "eval")))
    for name, key, form in (
        ("loss, nats per pair", "loss", ".4f"),
        ("pairs ranked right", "accuracy", ".1%"),
        ("mean margin", "margin", ".3f"),
    ):
        table.add_row(name, *(f"{values[key]:{form}}" if key in values else "" for values in (train, held_out)))
    table.add_section()
    too_long = sum(source["too_long"] for sources in card["data"]["sources"].values() for source in sources)
    table.add_row("pairs left out as too long", f"{too_long:,}")
    table.add_row("updates", f"{result['steps']:,}")
    table.add_row("duration", f"{card['seconds']:,.0f} s")
    table.add_row("peak memory", f"{result['peak_memory'] / 2**30:.2f} GiB")
    return table
