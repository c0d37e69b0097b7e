"""Files of JSON lines, packed or not, read row by row.

`datasets` gives all files the types that it finds in the first rows, which the metadata of large corpora contradict.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from l2d_framework.lines import read_lines, read_objects


def first_columns(file: str) -> tuple[str, ...]:
    """Columns of a file's first row; none if it holds one JSON value over several lines, or a list."""
    _, line = next(read_lines(file))
    try:
        first = json.loads(line)
    except ValueError:
        return ()
    return tuple(first) if isinstance(first, dict) else ()


def json_lines(files: list[str], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of some files, one after the other, as values by column; None where a row lacks it."""
    for file in files:
        for _, row in read_objects(file):
            yield {name: row.get(name) for name in columns}
