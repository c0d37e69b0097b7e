"""Lines of text files, packed or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import infer_compression

from l2d_framework.errors import DataError

COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz"}


def read_lines(file: str | Path) -> Iterator[tuple[int, str]]:
    r"""Lines that hold more than blanks, with their numbers from 1."""
    name, number = str(file), 0
    if infer_compression(name) is None and Path(name).suffix in COMPRESSIONS:
        raise DataError(f"{name!r} cannot be unpacked without another package. Run: pip install zstandard")
    try:
        with fsspec.open(name, "rt", compression="infer", encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"{name!r} is no text in UTF-8 after line {number} ({error}). Convert it first.") from error
    except FileNotFoundError as error:
        raise DataError(f"There is no file {name!r}. Check the path.") from error
    # Every way of packing fails in its own way.
    except Exception as error:
        raise DataError(
            f"{name!r} cannot be read after line {number}: {type(error).__name__}: {error}. Mend or remove it."
        ) from error


def read_objects(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects of a file, one a line, with the numbers of their lines from 1."""
    for number, line in read_lines(file):
        try:
            value, problem = json.loads(line), f"got {line[:80]}"
        except (ValueError, RecursionError) as error:
            value, problem = None, str(error)
        if not isinstance(value, dict):
            raise DataError(f"{file}:{number} is not a JSON object ({problem}). Write one object a line.")
        yield number, value
