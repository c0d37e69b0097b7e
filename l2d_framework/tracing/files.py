"""A trace on disk: a page or a picture, by the ending of the file's name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.plots import INSTALL, can_plot
from l2d_framework.tracing.page import write_page
from l2d_framework.tracing.plots import draw_trace
from l2d_framework.tracing.record import Trace

_WRITERS: dict[str, Callable[..., None]] = {".html": write_page, ".png": draw_trace}


def check_trace_file(path: Path) -> None:
    """Refuse a file that `write_trace` could not write, or would overwrite."""
    writer = _writer(path)
    if path.exists():
        raise ConfigError(f"{str(path)!r} exists. Name another file for the trace, so that nothing is lost.")
    folder = path.resolve().parent
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{str(folder)!r} is missing or cannot be written. Name another file for the trace.")
    if writer is draw_trace and not can_plot():
        raise ConfigError(f"Heat maps need matplotlib. {INSTALL}")


def write_trace(trace: Trace, tokenizer: PreTrainedTokenizerBase, path: Path, *, title: str = "") -> None:
    """Write a page (.html) or heat maps (.png) under a heading."""
    _writer(path)(trace, tokenizer, path, title=title)


def _writer(path: Path) -> Callable[..., None]:
    try:
        return _WRITERS[path.suffix.lower()]
    except KeyError:
        raise ConfigError(f"A trace is written to {' or '.join(_WRITERS)}, got {str(path)!r}.") from None
