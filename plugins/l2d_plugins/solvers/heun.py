"""Heun's trapezoidal method."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from l2d_framework.solver import Problem, Solver


class Heun(Solver):
    """Follows the mean of the slopes at both ends of each interval.

    Order 2, two evaluations per step. Each estimate is asked for at the temperature one interval ahead, at most that of
    t = 1, as the released L2D code does for every method that evaluates the end of its interval.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.1; `heun2` of torchdiffeq.
    """

    stages: ClassVar[int] = 2
    order: ClassVar[int] = 2
    evaluates_end: ClassVar[bool] = True

    name: Literal["heun"] = "heun"

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
        h = s - t
        start = problem.velocity(x, t, until=s)
        end = problem.velocity(x + h * start, s, until=min(s + h, 1.0))
        return x + (h / 2) * (start + end)
