"""Files of JSON lines, packed or not, read row by row.

`datasets` gives all files the types that it finds in the first rows, which the metadata of large corpora contradict.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import infer_compression

from l2d_framework.errors import DataError

COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz"}


def first_columns(file: str) -> tuple[str, ...]:
    """Columns of the first row of a file.

    Args:
        file: its path.

    Returns:
        Their names; none if the file holds one JSON value over several lines, or a list.

    Raises:
        StopIteration: if the file is empty.
    """
    with _open_text(file) as lines:
        try:
            first = json.loads(next(line for line in lines if line.strip()))
        except json.JSONDecodeError:
            return ()
    return tuple(first) if isinstance(first, dict) else ()


def json_lines(files: list[str], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of some files, one after the other.

    Args:
        files: their paths.
        columns: what to keep of each row.

    Yields:
        Values by column; None where a row lacks it.

    Raises:
        DataError: if a file cannot be read or a line is no JSON object.
    """
    for file in files:
        number, opened = 0, _open_text(file)
        try:
            with opened as lines:
                for line in lines:
                    number += 1
                    if line.strip():
                        row = dict(json.loads(line))
                        yield {name: row.get(name) for name in columns}
        # Every way of packing fails in its own way.
        except Exception as error:
            raise DataError(
                f"{file!r} cannot be loaded near line {number}: {type(error).__name__}: {error}. Mend or remove it."
            ) from error


def _open_text(file: str) -> Any:
    if infer_compression(file) is None and Path(file).suffix in COMPRESSIONS:
        raise DataError(f"{file!r} cannot be unpacked without another package. Run: pip install zstandard")
    return fsspec.open(file, "rt", compression="infer", encoding="utf-8", newline="\n")
