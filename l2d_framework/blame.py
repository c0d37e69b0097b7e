"""Whose code failed: errors of a third party's component name it and its distribution."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from l2d_framework.component import Component
from l2d_framework.errors import L2DError, PluginError

_OURS = ("l2d_framework", "l2d_plugins")
_SHIPPED: dict[type, str] = {}
_PACKAGES: dict[str, str] = {}


def attribute(offered: Any, distribution: str) -> None:
    """Note who ships a component or converter, so that its errors can say so."""
    package = _package(getattr(offered, "__module__", None) or "")
    if package and package not in _OURS:
        _PACKAGES[package] = distribution
        if isinstance(offered, type):
            _SHIPPED[offered] = distribution


def described(component: Component) -> str:
    """A component for messages: its kind and name, and of a third party's the distribution."""
    shipped = _SHIPPED.get(type(component))
    return f"{component.kind} {component.component_name()!r}" + (f" of {shipped}" if shipped else "")


@contextmanager
def naming_plugins() -> Iterator[None]:
    """Turn what goes wrong inside a third party's component into an error that names it."""
    try:
        yield
    except Exception as error:
        # The name is that of torch's own error, which the registry does without.
        if isinstance(error, (L2DError, MemoryError)) or type(error).__name__ == "OutOfMemoryError":
            raise
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        inside = [frame for frame in frames if _package(_module(frame)) in (*_OURS, *_PACKAGES)]
        foreign = [frame for frame in inside if _package(_module(frame)) not in _OURS]
        if not foreign:
            raise
        where = _culprit(frames[: frames.index(foreign[-1]) + 1])
        if inside[-1] is not foreign[-1]:
            error.add_note(f"It came up in a call from {where}.")
            raise
        raise PluginError(
            f"{where[0].upper()}{where[1:]} failed in {foreign[-1].f_code.co_name!r}: {type(error).__name__}: {error}. "
            "Tell its authors, or do without it."
        ) from error


def _culprit(frames: list[FrameType]) -> str:
    """The component whose method is running, the innermost; at least the distribution."""
    for frame in reversed(frames):
        this: Any = frame.f_locals.get("self")
        for component in (this, getattr(this, "config", None)):
            if isinstance(component, Component) and type(component) in _SHIPPED:
                return described(component)
    return f"code of {_PACKAGES[_package(_module(frames[-1]))]}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _package(module: str) -> str:
    return module.partition(".")[0]
