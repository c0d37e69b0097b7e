"""Errors a user can cause; each says what was wrong, the value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class L2DError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(L2DError, ValueError):
    """A run file, option or argument is wrong; raised before any weights are loaded."""


class PluginError(L2DError, ValueError):
    """A component is unknown, broken, clashes with another or lacks its extra."""


class DataError(L2DError, ValueError):
    """A data source, column or example cannot be used."""


class CheckpointError(L2DError, ValueError):
    """A checkpoint is incomplete, corrupted, or belongs to another base model."""


class UnsupportedModelError(L2DError, ValueError):
    """A backbone cannot serve this language model."""


class EvaluationBudgetError(L2DError, RuntimeError):
    """An adaptive solve needed more network evaluations than it was allowed."""


def shown(value: object) -> str:
    """A value as a message shows it.

    Args:
        value: what the user wrote.

    Returns:
        Its repr, cut to 80 characters.
    """
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def suggest(name: str, known: Iterable[str]) -> str:
    """Sentence fragment that offers the closest known names.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Returns:
        "; did you mean 'x'?" or "" when nothing is close.
    """
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
