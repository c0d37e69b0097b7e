"""The midpoint method."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from l2d_framework.solver import Problem, Solver


class Midpoint(Solver):
    """Follows the slope found half an interval ahead.

    Order 2, two evaluations per step; never needs the velocity at the end time. The solver of the L2D paper.
    """

    stages: ClassVar[int] = 2
    order: ClassVar[int] = 2

    name: Literal["midpoint"] = "midpoint"

    def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
        """Move from time t to time s.

        Args:
            problem: the differential equation.
            x: state at t, (B, L, D), float32.
            t: time of `x`.
            s: time to move to.

        Returns:
            State at s, (B, L, D).
        """
        half = (s - t) / 2
        middle = t + half
        ahead = x + half * problem.velocity(x, t, until=middle)
        return x + (s - t) * problem.velocity(ahead, middle, until=s)
