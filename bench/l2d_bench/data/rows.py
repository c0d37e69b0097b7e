"""Rows of the files that measures read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from l2d_framework.errors import DataError
from l2d_framework.lines import read_objects

Row = dict[str, str]


def read_rows(file: str, columns: Sequence[str], limit: int | None) -> list[Row]:
    """First rows of a file.

    Args:
        file: JSON lines.
        columns: names every row has to have.
        limit: how many; all when None.

    Returns:
        The rows.

    Raises:
        DataError: if there is no such file, no row, or a row is no object or lacks a column.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"There is no file {file!r}. Name a JSONL file with {list(columns)}.")
    rows: list[Row] = [row for _, row in islice(read_objects(path), limit)]
    if not rows:
        raise DataError(f"{file!r} is empty. Name a JSONL file with {list(columns)}.")
    for number, row in enumerate(rows, 1):
        lacking = [name for name in columns if not isinstance(row.get(name), str)]
        if lacking:
            raise DataError(f"Row {number} of {file!r} has no text under {lacking}; it has {list(row)}.")
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file.

    Args:
        path: a JSONL file in a folder that is put into place as a whole.
        rows: what to write.
    """
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prompts_of(rows: Sequence[Row], *, chat: bool) -> list[Any]:
    """Prompts of rows.

    Args:
        rows: with `prompt`.
        chat: as conversations of one turn instead of as texts.

    Returns:
        One per row.
    """
    return [[{"role": "user", "content": row["prompt"]}] if chat else row["prompt"] for row in rows]
