"""Generated texts from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2d_framework.errors import DataError, suggest
from l2d_framework.generation.chat_template import check_text
from l2d_framework.lines import read_objects


@dataclass(frozen=True)
class Sample:
    """A generated text."""

    prefix: str  # what it continues; "" for nothing
    text: str
    gold: str | None = None  # what a human wrote in its place


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a file."""

    prefix: str = "prefix"
    text: str = "text"
    gold: str = "gold"


def read_samples(file: Path, columns: Columns, *, golds: Sequence[str] | None = None) -> list[Sample]:
    """Samples of a JSONL file of `l2d generate --out`, conversations as one line a turn, or with other columns."""
    rows = _read_rows(file)
    if golds is not None and len(golds) != len(rows):
        raise DataError(
            f"{str(file)!r} has {len(rows)} rows and the file of golds {len(golds)}. Give one gold per row."
        )
    samples = []
    for index, row in enumerate(rows):
        where = f"Row {index + 1} of {str(file)!r}"
        gold = golds[index] if golds is not None else _optional_string(row, columns.gold, where)
        if "answers" in row:
            samples += [Sample(_prompt(row, where), text, gold) for text in _answers(row["answers"], where)]
        else:
            samples.append(Sample(_string(row, columns.prefix, where), _string(row, columns.text, where), gold))
    if not any(sample.text.strip() for sample in samples):
        raise DataError(f"{str(file)!r} holds no generated text: all {len(samples)} are empty. Name another file.")
    return samples


def read_golds(file: Path, column: str) -> list[str]:
    """Texts that humans wrote."""
    return [_string(row, column, f"Row {index} of {str(file)!r}") for index, row in enumerate(_read_rows(file), 1)]


def _read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise DataError(f"There is no file {str(file)!r}. Give a JSONL file, such as `l2d generate --out` writes.")
    rows = [row for _, row in read_objects(file)]
    if not rows:
        raise DataError(f"{str(file)!r} is empty. Give a JSONL file, such as `l2d generate --out` writes.")
    return rows


def _string(row: dict[str, Any], column: str, where: str) -> str:
    text = _optional_string(row, column, where)
    if text is None:
        raise DataError(
            f"{where} has no column {column!r}{suggest(column, row) or '.'} It has {list(row)}. Name the columns with "
            '--prefix-column, --text-column and --gold-column; a text without a prefix has the prefix "".'
        )
    return text


def _optional_string(row: dict[str, Any], column: str, where: str) -> str | None:
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where} has {column!r} of type {type(text).__name__}, not text: {str(text)[:80]}.")
    return text if text is None else _whole(text, where)


def _prompt(row: dict[str, Any], where: str) -> str:
    prompt = row.get("prompt")
    try:
        if not isinstance(prompt, str):
            prompt = "".join(f"{message['content']}\n" for message in prompt or ())
        return _whole(prompt, where)
    except (TypeError, KeyError) as error:
        raise DataError(f"{where} has a `prompt` that is neither text nor messages: {str(prompt)[:80]}.") from error


def _answers(answers: Any, where: str) -> list[str]:
    try:
        texts = [answer["text"] for answer in answers]
    except (TypeError, KeyError) as error:
        raise DataError(f"{where} has `answers` without `text`: {str(answers)[:80]}.") from error
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where} has no text among its `answers`: {str(answers)[:80]}.")
    return [_whole(text, where) for text in texts]


def _whole(text: str, where: str) -> str:
    try:
        return check_text(text)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
