"""Solvers."""

from __future__ import annotations

from l2d_framework.component import Component
from l2d_framework.hooks import hookimpl
from l2d_plugins.solvers.bosh3 import Bosh3
from l2d_plugins.solvers.euler import Euler
from l2d_plugins.solvers.fehlberg2 import Fehlberg2
from l2d_plugins.solvers.heun import Heun
from l2d_plugins.solvers.midpoint import Midpoint
from l2d_plugins.solvers.renoise import Renoise
from l2d_plugins.solvers.rk4 import RK4


@hookimpl
def l2d_components() -> list[type[Component]]:
    """Solvers of this package.

    Returns:
        Their classes.
    """
    return [Euler, Midpoint, Heun, RK4, Fehlberg2, Bosh3, Renoise]
