"""What tells one configuration from another, option by option."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

_MOST, _WIDTH, _BEFORE = 8, 200, 20
"""Differences that a message names, characters of each value, which may be a chat template, and how many of them may
stand before where one differs from the other."""


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Values by their path, such as `training.betas.0`; what is empty is a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or (path and not value):
        return {path: value}
    out: dict[str, Any] = {}
    for key, inner in items:
        out |= flat(inner, f"{path}.{key}" if path else str(key))
    return out


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of every option that differs, by its path; None where there is none."""
    before, after = flat(dict(there)), flat(dict(now))
    pairs = {name: (before.get(name), after.get(name)) for name in sorted(before.keys() | after.keys())}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def said(name: str, old: Any, new: Any) -> str:
    """A difference in words, with its values whole."""
    return f"{name}: {old!r} there, {new!r} now"


def told(found: Mapping[str, tuple[Any, Any]]) -> str:
    """The first differences, for a message; of long texts that part in which they differ."""
    lines = [said(name, *_parts(*values)) for name, values in found.items()]
    return "; ".join([*lines[:_MOST], *([f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else [])])


def _parts(old: Any, new: Any) -> list[Any]:
    begin = 0
    if isinstance(old, str) and isinstance(new, str) and max(len(old), len(new)) > _WIDTH:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False))
        begin = max(0, sum(1 for _ in same) - _BEFORE)
    return [_part(value, begin) if isinstance(value, str) else value for value in (old, new)]


def _part(text: str, begin: int) -> str:
    return "..." * (begin > 0) + text[begin : begin + _WIDTH] + "..." * (len(text) > begin + _WIDTH)
