"""Prompts from files, and answers to files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2d_framework.errors import DataError
from l2d_framework.prompts import Prompt


def read_prompts(texts: Sequence[str], file: Path | None, *, chat: bool) -> list[Prompt]:
    """Prompts from the command line and a file.

    Args:
        texts: from the command line.
        file: text with one prompt a line, or JSONL with `prompt` or `messages`.
        chat: make a conversation of each plain text.

    Returns:
        The prompts, in order.

    Raises:
        DataError: if the file is missing, empty, or a line cannot be read.
    """
    prompts: list[Prompt] = list(texts)
    if file is not None:
        if not file.is_file():
            raise DataError(f"There is no file {str(file)!r}. Give a text file with one prompt a line, or JSONL.")
        try:
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{str(file)!r} is no text in UTF-8 ({error}). Convert it first.") from error
        if not lines:
            raise DataError(f"{str(file)!r} holds no prompt.")
        is_json = file.suffix in (".jsonl", ".json")
        prompts += [_json_prompt(line, f"{file}:{n}") if is_json else line for n, line in enumerate(lines, 1)]
    return [[{"role": "user", "content": p}] if chat and isinstance(p, str) else p for p in prompts]


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
        found = row.get("prompt", row.get("messages"))
    except (ValueError, AttributeError) as error:
        raise DataError(f"{where} is not a JSON object ({error}).") from error
    if not isinstance(found, (str, list)):
        raise DataError(f"{where} has neither `prompt` nor `messages`; it has {list(row)}.")
    if isinstance(found, list) and not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found):
        raise DataError(f"{where} has messages without `role` and `content`, got {found}.")
    return found


def write_rows(output: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write a JSONL file in one piece.

    Args:
        output: the file, or None to write nothing.
        rows: one per line.
    """
    if output is None:
        return
    temporary = output.with_name(output.name + ".part")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, output)
