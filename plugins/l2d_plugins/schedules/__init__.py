"""Noise schedules."""

from __future__ import annotations

from l2d_framework.component import Component
from l2d_framework.hooks import hookimpl
from l2d_plugins.schedules.cosine import Cosine
from l2d_plugins.schedules.information import Information
from l2d_plugins.schedules.linear import Linear


@hookimpl
def l2d_components() -> list[type[Component]]:
    """Noise schedules of this package."""
    return [Cosine, Information, Linear]
