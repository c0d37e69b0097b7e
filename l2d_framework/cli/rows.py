"""Prompts from files, and answers to files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fsspec.utils import infer_compression

from l2d_framework.errors import ConfigError, DataError
from l2d_framework.evaluation.tables import write_whole
from l2d_framework.generation.chat_template import check_conversation
from l2d_framework.generation.prompts import Prompt
from l2d_framework.lines import read_lines, read_objects


def read_prompts(texts: Sequence[str], file: Path | None, *, chat: bool) -> dict[str, Prompt]:
    """Prompts of the command line and of a file (text or JSONL), in order, by what messages call them."""
    prompts: dict[str, Prompt] = {f"Prompt {number}": text for number, text in enumerate(texts)}
    if file is not None:
        if not file.is_file():
            raise DataError(f"There is no file {str(file)!r}. Give a text file with one prompt a line, or JSONL.")
        is_json = Path(file.stem if infer_compression(str(file)) else file).suffix in (".jsonl", ".json")
        read: Iterable[tuple[int, Any]] = read_objects(file) if is_json else read_lines(file)
        rows = {f"{file}:{number}": value for number, value in read}
        if not rows:
            raise DataError(f"{str(file)!r} holds no prompt.")
        prompts |= {where: _json_prompt(row, where) if is_json else row for where, row in rows.items()}
    return {
        where: [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
        for where, prompt in prompts.items()
    }


def _json_prompt(row: dict[str, Any], where: str) -> Prompt:
    prompt = next((row[name] for name in ("prompt", "messages") if row.get(name) is not None), None)
    if not isinstance(prompt, (str, list)):
        raise DataError(f"{where} has neither `prompt` nor `messages`; it has {list(row)}.")
    try:
        return prompt if isinstance(prompt, str) else check_conversation(prompt)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def check_output(output: Path | None) -> None:
    """Refuse a file that cannot be written."""
    if output is None:
        return
    if output.exists():
        raise ConfigError(f"{str(output)!r} exists. Name another --output, so that nothing is lost.")
    if not os.access(output.resolve().parent, os.W_OK):
        raise ConfigError(f"{str(output.resolve().parent)!r} is missing or cannot be written. Name another --output.")


def write_rows(output: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write a JSONL file, if one is named, in one piece."""
    if output is None:
        return
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
