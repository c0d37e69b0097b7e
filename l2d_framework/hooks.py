"""The hooks a plugin may implement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from typer import Typer

GROUP = "l2d_framework"
"""Entry-point group and pluggy project name."""

EXTENSIONS = "l2d_framework.extensions"
"""Entry-point group of plugins with commands or tasks; apart from components, so that `l2d --help` imports no torch."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def l2d_components() -> Sequence[type]:  # type: ignore[empty-body]
    """Component classes this plugin offers; the kind is the base class, the name its `Literal` field."""


@hookspec
def l2d_presets() -> Mapping[str, Mapping[str, Any]]:  # type: ignore[empty-body]
    """Named `sampling` sections, such as `{"l2d-paper": {"solver": {"name": "midpoint"}}}`."""


@hookspec
def l2d_methods() -> Mapping[str, Mapping[str, Any]]:  # type: ignore[empty-body]
    """Fields of a diffusion run by name; `method: NAME` in a run file lays the rest of the file over them.

    Beside them a `description` may stand: a sentence that `l2d help method` and editors show.
    """


@hookspec
def l2d_converters() -> Mapping[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Readers of foreign checkpoints by format name, such as `{"l2d-reference": read}`.

    A reader takes the folder and returns `l2d_framework.types.ForeignCheckpoint`.
    """


@hookspec
def l2d_commands() -> Mapping[str, Typer]:  # type: ignore[empty-body]
    """Commands of `l2d` by name, each a typer app whose help `l2d --help` shows; group `l2d_framework.extensions`."""


@hookspec
def l2d_tasks() -> Path:  # type: ignore[empty-body]
    """Folder of lm_eval task files that `l2d eval` and `l2d tune-search` know; group `l2d_framework.extensions`."""
