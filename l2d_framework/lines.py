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
Span = tuple[int, int]
"""Bytes of a file, from one to before another, for the lines that begin there."""


def spans(file: str | Path, size: int) -> list[Span | None]:
    """Stretches of about so many bytes that make up a file; one, None, of a file that is short, packed or far away."""
    path = Path(file)
    if infer_compression(str(file)) or not path.is_file() or (length := path.stat().st_size) <= size:
        return [None]
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def read_lines(file: str | Path, span: Span | None = None) -> Iterator[tuple[int, str]]:
    r"""Lines of a file or of a stretch of it that hold more than blanks, with their numbers from 1."""
    name, number = str(file), 0
    if infer_compression(name) is None and Path(name).suffix in COMPRESSIONS:
        raise DataError(f"{name!r} cannot be unpacked without another package. Run: pip install zstandard")
    try:
        for number, line in enumerate(_lines(name, span), 1):
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


def _lines(name: str, span: Span | None) -> Iterator[str]:
    if span is None:
        with fsspec.open(name, "rt", compression="infer", encoding="utf-8-sig", newline="\n") as lines:
            yield from lines
        return
    start, end = span
    with open(name, "rb") as raw:
        if start:
            # The line in which the stretch begins belongs to the one before, unless it begins with it.
            raw.seek(start - 1)
            raw.readline()
        while (place := raw.tell()) < end:
            yield raw.readline().decode("utf-8" if place else "utf-8-sig")


def read_objects(file: str | Path, span: Span | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects of a file or of a stretch of it, one a line, with the numbers of their lines from 1."""
    behind = f" (counted behind byte {span[0]})" if span is not None and span[0] else ""
    for number, line in read_lines(file, span):
        try:
            value, problem = json.loads(line), f"got {line[:80]}"
        except (ValueError, RecursionError) as error:
            value, problem = None, str(error)
        if not isinstance(value, dict):
            raise DataError(f"{file}:{number}{behind} is not a JSON object ({problem}). Write one object a line.")
        yield number, value
