"""Solvers."""

from __future__ import annotations

from l2d_framework.component import Component
from l2d_framework.hooks import hookimpl
from l2d_plugins.solvers.adaptive import Bosh3, Fehlberg2
from l2d_plugins.solvers.renoise import Renoise
from l2d_plugins.solvers.runge_kutta import RK4, Euler, Heun, Midpoint


@hookimpl
def l2d_components() -> list[type[Component]]:
    """Solvers of this package."""
    return [Euler, Midpoint, Heun, RK4, Fehlberg2, Bosh3, Renoise]
