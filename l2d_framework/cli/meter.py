"""How far a command is: a bar on a terminal, elsewhere a line every ten seconds; always on standard error."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from threading import Event, Thread
from typing import Self, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TimeElapsedColumn
from rich.text import Text
from typing_extensions import override

T = TypeVar("T")

SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Meter:
    """Reports from a thread of its own, so that a step that takes minutes is reported, too.

    What is asked for alone goes to standard output, which may be a pipe; of this nothing does.
    """

    def __init__(self, title: str, unit: str = "", total: int | None = None) -> None:
        self.title, self.unit, self.total = title, unit, total
        self.facts = ""
        """What else there is to say, such as the number of tokens so far."""
        self._done = 0
        self._start = time.monotonic()
        self._over = Event()
        self._lines = Thread(target=self._write_lines, daemon=True)
        console = Console(stderr=True)
        self._bar: Progress | None = None
        self._speaks = os.environ.get("RANK", "0") == "0"  # for all processes, whose lines would mix
        if console.is_terminal and self._speaks:
            columns = (SpinnerColumn(), BarColumn(bar_width=16), _Text(self), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
        else:
            self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._lines.join()

    def __str__(self) -> str:
        total = "" if self.total is None else f"/{self.total:,}"
        count = f"{self._done:,}{total} {self.unit}" if self.unit else ""
        return "  ".join(part for part in (self.title, count, self.facts) if part)

    @property
    def seconds(self) -> float:
        """Time since it was made."""
        return time.monotonic() - self._start

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def track(self, items: Sequence[T] | Iterable[T], title: str | None = None) -> Iterator[T]:
        """Hand out items and count those that are done with; begins again from 0."""
        self.title, self._done = title or self.title, 0
        self.total = len(items) if isinstance(items, Sequence) else None
        if self._bar is not None:
            self._bar.update(self._task, total=self.total, completed=0)
        for item in items:
            yield item
            self.advance()

    def _write_lines(self) -> None:
        while not self._over.wait(SECONDS):
            if self._speaks:
                typer.echo(f"{self}  {self.seconds:,.0f} s", err=True)


class _Text(ProgressColumn):
    """What the meter says at the moment of drawing."""

    max_refresh = 0.1

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    @override
    def render(self, task: Task) -> Text:
        return Text(str(self._meter))
