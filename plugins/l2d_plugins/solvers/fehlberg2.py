"""Fehlberg's pair of orders 1 and 2."""

from __future__ import annotations

from typing import ClassVar, Literal

from l2d_plugins.solvers.embedded import EmbeddedPair, Tableau


class Fehlberg2(EmbeddedPair):
    """Adaptive method of order 2 with two new evaluations per attempted step; the adaptive solver of the L2D paper.

    Source: Fehlberg 1969, NASA TR R-315, Table XII (RKF1(2)); `fehlberg2` of torchdiffeq.
    """

    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = Tableau(
        nodes=(1 / 2, 1.0),
        coefficients=((1 / 2,), (1 / 256, 255 / 256)),
        weights=(1 / 512, 255 / 256, 1 / 512),
        errors=(-1 / 512, 0.0, 1 / 512),
    )

    name: Literal["fehlberg2"] = "fehlberg2"
