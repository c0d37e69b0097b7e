"""Bogacki and Shampine's pair of orders 3 and 2."""

from __future__ import annotations

from typing import ClassVar, Literal

from l2d_plugins.solvers.embedded import EmbeddedPair, Tableau


class Bosh3(EmbeddedPair):
    """Adaptive method of order 3 with three new evaluations per attempted step.

    Source: Bogacki and Shampine 1989, A 3(2) pair of Runge-Kutta formulas; `bosh3` of torchdiffeq.
    """

    order: ClassVar[int] = 3
    tableau: ClassVar[Tableau] = Tableau(
        nodes=(1 / 2, 3 / 4, 1.0),
        coefficients=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        weights=(2 / 9, 1 / 3, 4 / 9, 0.0),
        errors=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    )

    name: Literal["bosh3"] = "bosh3"
