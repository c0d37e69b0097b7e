"""`l2d demo`: a tiny language model becomes a diffusion language model, and what that buys is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from l2d_framework.evaluation.plots import INSTALL, can_plot
from l2d_framework.evaluation.tables import terminal

if TYPE_CHECKING:
    from l2d_framework.cli.progress import Reporter
    from l2d_framework.config import Run


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("l2d-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of questions, models and noise.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; shows that it runs, learns nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move a folder that exists aside.")] = False,
) -> None:
    """Train a tiny language model on synthetic text, finetune it with LoRA and with L2D, and compare their answers.

    Takes 5 to 15 minutes on two CPU cores and downloads nothing. Started again, it goes on where it was interrupted.
    """
    from l2d_framework.cli.progress import progress
    from l2d_framework.demo.measure import DEFAULT, WAYS
    from l2d_framework.demo.report import findings, learning_table, table
    from l2d_framework.demo.run import FULL, QUICK, Demo, one_thread
    from l2d_framework.training.output_dir import move_aside

    start = time.monotonic()
    console = Console()
    _silence_libraries()
    out = out.expanduser()
    if overwrite:
        move_aside(out)
    demo = Demo(out, QUICK if quick else FULL, seed)
    runs = demo.prepare()
    example = demo.data.held_out_new[0]
    console.print(
        f"The task: continue [bold]{example.prompt}[/] with [bold]{example.completion.strip()}[/]", highlight=False
    )

    beside = not quick and (os.cpu_count() or 1) > 1  # a quick LoRA is trained before another process has started
    titles = {"base": "1/4 base model ", "l2d": "2/4 L2D        ", "lora": "3/4 LoRA       "}

    def report(run: Run) -> list[Reporter]:
        name = Path(str(run.output_dir)).name
        if beside and name == "l2d":
            console.print("LoRA (3/4) is trained beside L2D (2/4), by a process that shows nothing.", highlight=False)
        return [progress(console, titles[name])]

    with one_thread():
        demo.train(runs, report, beside=beside)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("4/4 answering  ", total=len(WAYS) + 2 * (demo.size.checkpoints - 1))
            results = demo.measure(lambda: bar.advance(task))
    files = demo.write(results)
    console.print(terminal(table(results), "Exact match on held-out questions, ± standard error"))
    console.print(terminal(learning_table(results), "The same while they learn, L2D with {} at {}".format(*DEFAULT)))
    for finding in findings(results):
        console.print(f"- {finding}", highlight=False)
    if quick:
        console.print("This was a quick run: too little training for its numbers to mean anything.")
    if not can_plot():
        console.print(f"No pictures: matplotlib is missing. {INSTALL}, then this again.", markup=False)
    trained = ", ".join(f"{name} {card['seconds']:.0f} s" for name, card in results.cards.items())
    how = f"Training took {trained}{', LoRA beside L2D' if beside else ''}"
    console.print(f"{how}; this session {time.monotonic() - start:.0f} s in all.", highlight=False)
    console.print("Written:")
    for name in (*files, "l2d"):
        console.print(f"  {out / name}", highlight=False, soft_wrap=True)
    console.print("Generate, with 15 evaluations a token and with 1, which is the base model:")
    for command in demo.commands():
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
