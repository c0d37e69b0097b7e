"""What commands that measure show and write: a bar, a table, and a folder that is never overwritten."""

from __future__ import annotations

import importlib.util
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
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(*rows[0], box=box.SIMPLE_HEAD, title=title)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)


def can_draw() -> bool:
    """Whether pictures can be drawn; says what is missing if not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        typer.echo("No picture: matplotlib is missing. Run: pip install 'l2d-framework[plots]'", err=True)
    return found
