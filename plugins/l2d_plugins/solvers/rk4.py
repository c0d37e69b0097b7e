"""Kutta's 3/8 rule."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from l2d_framework.solver import Problem, Solver


class RK4(Solver):
    """The fourth-order Runge-Kutta method with nodes 0, 1/3, 2/3 and 1.

    Order 4, four evaluations per step. Each estimate is asked for at the temperature one interval ahead, at most that
    of t = 1, as the released L2D code does for every method that evaluates the end of its interval.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, Table II.1.2; `rk4` of torchdiffeq.
    """

    stages: ClassVar[int] = 4
    order: ClassVar[int] = 4
    evaluates_end: ClassVar[bool] = True

    name: Literal["rk4"] = "rk4"

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

        def slope(state: Tensor, time: float) -> Tensor:
            return problem.velocity(state, time, until=min(time + h, 1.0))

        k1 = slope(x, t)
        k2 = slope(x + h * k1 / 3, t + h / 3)
        k3 = slope(x + h * (k2 - k1 / 3), t + 2 * h / 3)
        k4 = slope(x + h * (k1 - k2 + k3), s)
        return x + h * (k1 + 3 * (k2 + k3) + k4) / 8
