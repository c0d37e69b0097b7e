"""What the scripts here check of their options before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from l2d_framework.base_model import load_config, load_tokenizer
from l2d_framework.config import ModelSection
from l2d_framework.errors import ConfigError, suggest

RESULTS = Path(__file__).parents[1] / "results"


def result_file(out: Path | None, name: str) -> Path:
    """An --out, there already or not, or the file of this name among the results; refused if it cannot be written."""
    file = out or RESULTS / name
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{str(file)!r} cannot be written. Name another --out.")
    return file


def check_known(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a value of an option that is none of those it may have."""
    choices = list(known)
    for value in given:
        if value not in choices:
            hint = suggest(value, choices) or "."
            raise ConfigError(f"{option}: unknown {value!r}{hint} Choose from {', '.join(map(repr, choices))}.")


def check_model(*names: str) -> None:
    """Refuse folders and hub ids of language models that hold none, or no tokenizer, before weights are loaded."""
    for name in names:
        reference = ModelSection(base=name)
        load_config(reference)
        if load_tokenizer(reference) is None:
            raise ConfigError(f"{name!r} has no tokenizer. Save its tokenizer there.")
