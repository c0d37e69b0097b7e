"""A table, its headings in the first row, as Markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Rows = Sequence[Sequence[str]]
"""Headings, then the rows."""


def markdown(rows: Rows) -> list[str]:
    """Lines of a table in Markdown."""
    heading, *body = rows
    return [
        f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (heading, ["---"] * len(heading), *body)
    ]


def terminal(rows: Rows, title: str | None = None) -> Table:
    """A table that rich can print; nothing in its cells is markup."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    heading, *body = rows
    table = Table(*map(escape, heading), box=box.SIMPLE_HEAD, title=None if title is None else escape(title))
    for row in body:
        table.add_row(*map(Text, row))
    return table
