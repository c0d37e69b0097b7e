"""`l2d demo`: a tiny language model becomes a diffusion language model, and what that buys is measured."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from l2d_framework.config import Run
    from l2d_framework.demo.findings import Results
    from l2d_framework.demo.measure import Measurement
    from l2d_framework.demo.scores import Outcome

_TITLES = {"base": "1/4 base model ", "lora": "2/4 LoRA       ", "l2d": "3/4 L2D        "}
_MEASURING = "4/4 answering  "


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("l2d-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of questions, models and noise.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; shows that it runs, learns nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move a folder that exists aside.")] = False,
) -> None:
    """Train a tiny language model on synthetic text, finetune it with LoRA and with L2D, and compare their answers.

    Takes a few minutes on two CPU cores and downloads nothing. Started again, it goes on where it was interrupted.

    Args:
        out: folder.
        seed: of everything.
        quick: a run too short to learn.
        overwrite: move an existing folder aside.
    """
    from rich.console import Console

    from l2d_framework.cli.progress import progress
    from l2d_framework.demo.measure import Measurement
    from l2d_framework.demo.plots import can_plot
    from l2d_framework.demo.run import Demo, one_thread
    from l2d_framework.demo.runs import FULL, QUICK
    from l2d_framework.training.output_dir import move_aside
    from l2d_framework.training.run import train_runs

    start = time.monotonic()
    console = Console()
    _silence_libraries()
    out = out.expanduser()
    if overwrite:
        move_aside(out)
    demo = Demo(out, QUICK if quick else FULL, seed)
    data, runs = demo.prepare()
    example = data.held_out_new[0]
    console.print(
        f"The task: continue [bold]{example.prompt}[/] with [bold]{example.completion.strip()}[/]", highlight=False
    )

    def title(run: Run) -> str:
        return _TITLES[Path(str(run.output_dir)).name]

    with one_thread():
        train_runs(runs, callbacks=lambda run: [progress(console, title(run))])
        measurement = Measurement(demo.folder, data)
        outcomes = _answer(console, measurement)
        results = demo.results(measurement, outcomes)
    files = demo.write(results, data)
    _show(console, results)
    if quick:
        console.print("This was a quick run: too little training for its numbers to mean anything.")
    if not can_plot():
        console.print("No pictures: matplotlib is missing. Run: pip install 'l2d-framework\\[plots]', then this again.")
    trained = ", ".join(f"{name} {card['seconds']:.0f} s" for name, card in results.cards.items())
    console.print(f"Training took {trained}; this session {time.monotonic() - start:.0f} s in all.", highlight=False)
    console.print("Written:")
    for name in (*(path.name for path in files), "l2d"):
        console.print(f"  {out / name}", highlight=False, soft_wrap=True)
    console.print("Generate, with 15 evaluations a token and with 1, which is the base model:")
    for command in demo.commands(data):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def _silence_libraries() -> None:
    import warnings

    import datasets
    import transformers

    # Of libraries about each other; a user of the demo can do nothing about them.
    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _answer(console: Console, measurement: Measurement) -> list[Outcome]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(_MEASURING, total=measurement.rounds)
        return measurement.outcomes(lambda: bar.advance(task))


def _show(console: Console, results: Results) -> None:
    from rich import box
    from rich.table import Table

    from l2d_framework.demo.findings import findings
    from l2d_framework.demo.report import COLUMNS, table

    shown = Table(*COLUMNS, box=box.SIMPLE_HEAD, title="Exact match on held-out questions, ± standard error")
    for row in table(results):
        shown.add_row(*row)
    console.print(shown)
    for finding in findings(results):
        console.print(f"- {finding}", highlight=False)
