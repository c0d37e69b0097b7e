"""What the scripts here check of their options before anything is measured, and how they keep what they find."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from l2d_framework.base_model import load_config, load_tokenizer
from l2d_framework.cli.common import check_device
from l2d_framework.config import ModelSection
from l2d_framework.errors import ConfigError, suggest
from l2d_framework.writing import write_whole

RESULTS = Path(__file__).parents[1] / "results"


def result_file(out: Path | None, name: str) -> Path:
    """An --out, there already or not, or the file of this name among the results; refused if it cannot be written."""
    file = out or RESULTS / name
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
    # Written beside it first, so that the folder must be writable whether the file is there or not.
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ConfigError(f"{str(file)!r} cannot be written. Name another --out.")
    return file


def write_card(out: Path, card: Mapping[str, Any]) -> None:
    """Write results as JSON, whole or not at all."""
    write_whole(out, json.dumps(card, indent=1) + "\n")


def known_device(name: str) -> torch.device:
    """A device that can be used here."""
    return torch.device(check_device(name))


def check_known(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a value of an option that is none of those it may have."""
    choices = list(known)
    for value in given:
        if value not in choices:
            hint = suggest(value, choices) or "."
            raise ConfigError(f"{option}: unknown {value!r}{hint} Choose from {', '.join(map(repr, choices))}.")


def known_model(name: str) -> str:
    """A folder or hub id; refused before weights are loaded if it holds no language model or no tokenizer."""
    reference = ModelSection(base=name)
    load_config(reference)
    if load_tokenizer(reference) is None:
        raise ConfigError(f"{name!r} has no tokenizer. Save its tokenizer there.")
    return reference.base
