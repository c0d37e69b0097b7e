"""A table, its headings in the first row, as Markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

Rows = Sequence[Sequence[str]]
"""Headings, then the rows."""

_SHORT = 14
"""Width up to which a cell is not wrapped."""
_BETWEEN = 3
"""What separates two columns."""


def markdown(rows: Rows) -> list[str]:
    """Lines of a table in Markdown."""
    heading, *body = rows
    return [
        f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (heading, ["---"] * len(heading), *body)
    ]


def terminal(rows: Rows, title: str | None = None) -> Fitting:
    """A table that rich can print; nothing in its cells is markup.

    Args:
        rows: headings, then the rows; short ones are filled up.
        title: stands above.

    Returns:
        What rich prints: where not all columns fit beside each other, several tables below each other, each with the
        first column.
    """
    return Fitting(rows, title)


class Fitting:
    """A table whose columns are as wide as their longest word, however narrow the terminal is."""

    def __init__(self, rows: Rows, title: str | None) -> None:
        width = max(map(len, rows))
        self._rows = [[*row, *[""] * (width - len(row))] for row in rows]
        self._title = title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        title = self._title
        for columns in _groups([_width(column) for column in zip(*self._rows, strict=True)], options.max_width):
            yield _table([[row[column] for column in columns] for row in self._rows], title)
            title = None


def _longest_word(cells: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max((cell_len(word) for cell in cells for word in cell.split()), default=0)


def _width(cells: Sequence[str]) -> int:
    """Cells of a terminal that a column should have: its longest word, and all of what is short."""
    from rich.cells import cell_len

    return max(_longest_word(cells), min(max(map(cell_len, cells)), _SHORT))


def _groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns that fit beside each other, the first in every group."""
    groups: list[list[int]] = [[0]]
    for column in range(1, len(widths)):
        together = [*groups[-1], column]
        if len(together) > 2 and sum(widths[other] + _BETWEEN for other in together) + 1 > room:
            groups.append([0])
        groups[-1].append(column)
    return groups


def _table(rows: Rows, title: str | None) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    heading, *body = rows
    table = Table(box=box.SIMPLE_HEAD, title=None if title is None else escape(title))
    for name, cells in zip(heading, zip(*rows, strict=True), strict=True):
        table.add_column(escape(name), min_width=_longest_word(cells))
    for row in body:
        table.add_row(*map(Text, row))
    return table
