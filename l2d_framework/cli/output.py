"""What commands that measure show and write: a bar, a table, and a folder that is never overwritten."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from l2d_framework.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress


def check_folder(folder: Path | None, option: str) -> None:
    """Refuse a folder for results that is taken or cannot be written; `option` names it."""
    if folder is None:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{str(folder)!r} exists and is not empty. Name another {option}, so that nothing is lost.")
    existing = next(above for above in (folder.resolve(), *folder.resolve().parents) if above.exists())
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{str(existing)!r} cannot be written. Name another {option}.")


@contextmanager
def bar() -> Iterator[Progress]:
    """A bar on standard error: the table alone goes to standard output, which may be a pipe."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield progress


def show(rows: Sequence[Sequence[str]], notes: Sequence[str], *, title: str) -> None:
    """Print a table, whose first row is its heading, and notes below it."""
    from rich.console import Console

    from l2d_framework.evaluation.tables import terminal

    console = Console()
    console.print(terminal(rows, title))
    for note in notes:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)


def can_draw() -> bool:
    """Whether pictures can be drawn; says what is missing if not."""
    from l2d_framework.evaluation.plots import INSTALL, can_plot

    if not can_plot():
        typer.echo(f"No picture: matplotlib is missing. {INSTALL}", err=True)
        return False
    return True
