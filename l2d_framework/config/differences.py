"""What tells one configuration from another, option by option."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

_MOST, _WIDTH = 8, 500
"""Differences that a message names, and characters of each, which may be a chat template."""


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Values by their path, such as `training.betas.0`; what is empty is a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or (path and not value):
        return {path: value}
    out: dict[str, Any] = {}
    for key, inner in items:
        out |= flat(inner, f"{path}.{key}" if path else str(key))
    return out


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Both values of every option that differs, by its path."""
    before, after = flat(dict(there)), flat(dict(now))
    pairs = {name: (before.get(name), after.get(name)) for name in sorted(before.keys() | after.keys())}
    return {name: f"{old!r} there, {new!r} now" for name, (old, new) in pairs.items() if old != new}


def told(found: Mapping[str, str]) -> str:
    """The first differences, for a message."""
    lines = [shorten(f"{name}: {values}", _WIDTH, placeholder="...") for name, values in found.items()]
    return "; ".join([*lines[:_MOST], *([f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else [])])
