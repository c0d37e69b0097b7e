"""Euler's method."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from l2d_framework.solver import Problem, Solver


class Euler(Solver):
    """Follows the slope at the start of each interval.

    Order 1, one evaluation per step; never needs the velocity at the end time.
    """

    name: Literal["euler"] = "euler"

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
        return x + (s - t) * problem.velocity(x, t, until=s)
