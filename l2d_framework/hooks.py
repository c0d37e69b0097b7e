"""The hooks a plugin may implement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pluggy

GROUP = "l2d_framework"
"""Entry-point group and pluggy project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def l2d_components() -> Sequence[type]:  # type: ignore[empty-body]
    """Component classes this plugin offers; the kind is the base class, the name its `Literal` field."""


@hookspec
def l2d_presets() -> Mapping[str, Mapping[str, Any]]:  # type: ignore[empty-body]
    """Named `sampling` sections, such as `{"l2d-paper": {"solver": {"name": "midpoint"}}}`."""


@hookspec
def l2d_converters() -> Mapping[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Readers of foreign checkpoints by format name, such as `{"l2d-reference": read}`.

    A reader takes the folder and returns `l2d_framework.types.ForeignCheckpoint`.
    """
