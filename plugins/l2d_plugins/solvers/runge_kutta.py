"""Runge-Kutta methods that take one step per interval, each by its tableau."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from l2d_framework.solver import Problem, Solver, Time, as_time


@dataclass(frozen=True)
class Tableau:
    """Coefficients of an explicit Runge-Kutta method."""

    nodes: tuple[float, ...]  # where each stage but the first stands in the step, 0 to 1
    coefficients: tuple[tuple[float, ...], ...]  # of the earlier slopes in the state of each stage but the first
    weights: tuple[float, ...]  # of all slopes in the step
    errors: tuple[float, ...] = ()  # the weights minus those of an embedded method, where there is one


class RungeKutta(Solver):
    """Steps by the class's tableau, without an error estimate.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.1.
    """

    tableau: ClassVar[Tableau]

    @property
    @override
    def stages(self) -> int:
        return len(self.tableau.weights)

    @property
    @override
    def evaluates_end(self) -> bool:
        return 1.0 in self.tableau.nodes

    @override
    def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
        slopes = self._slopes(problem, x, problem.velocity(x, t), (t, s))
        return x + (s - t) * combine(self.tableau.weights, slopes)

    def _slopes(
        self, problem: Problem, x: Tensor, first: Tensor, interval: tuple[Time, Time], active: Tensor | None = None
    ) -> list[Tensor]:
        t, s = interval
        h, slopes = s - t, [first]
        width = h[..., None] if isinstance(h, Tensor) else h
        for node, row in zip(self.tableau.nodes, self.tableau.coefficients, strict=True):
            # t + (s - t) may round to beyond s.
            now = s if node == 1 else t + node * h
            slopes.append(problem.velocity(x + width * combine(row, slopes), now, active=active))
        return slopes


def combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """Sum of slopes, each (B, L, D), with weights that are not all 0."""
    terms = zip(weights, slopes, strict=True)
    return reduce(torch.add, (slope if weight == 1 else weight * slope for weight, slope in terms if weight))


class Euler(RungeKutta):
    """Follows the slope at the start of each interval.

    Order 1, one evaluation per step; never needs the velocity at the end time. With `churn`, every step first goes back
    towards the noise and adds as much of it, fresh, as belongs there, so that what an estimate has settled on too early
    can change.

    Source: churn of ELF, arXiv:2605.10938; the noise keeps the variance, as in Karras et al. 2022, arXiv:2206.00364,
    Algorithm 2.
    """

    tableau: ClassVar[Tableau] = Tableau((), (), (1.0,))

    name: Literal["euler"] = "euler"
    churn: float = Field(0.0, ge=0, allow_inf_nan=False)
    """How far a step of length h at time t goes back, to (1 - churn h) t; 0 for not at all. 1 to 1.5 where answers
    vary too little."""

    @property
    @override
    def is_stochastic(self) -> bool:
        return self.churn > 0

    @override
    def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
        back = max(0.0, 1 - self.churn * (s - t)) * t
        if back < t:
            x, t = _churned(problem, x, t, back), back
        return super().step(problem, x, t, s)


def _churned(problem: Problem, x: Tensor, t: float, back: float) -> Tensor:
    """A state at an earlier time: as much of the clean state as belongs there, and fresh noise in place of the rest."""
    schedule, then, now = problem.schedule, as_time(back, x), as_time(t, x)
    kept = schedule.alpha(then) / schedule.alpha(now)
    fresh = (schedule.sigma(then).square() - (kept * schedule.sigma(now)).square()).clamp_min(0).sqrt()
    return kept[..., None] * x + fresh[..., None] * problem.fresh_noise(x)


class Midpoint(RungeKutta):
    """Follows the slope found half an interval ahead.

    Order 2, two evaluations per step; never needs the velocity at the end time. The solver of the L2D paper.
    """

    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = Tableau((1 / 2,), ((1 / 2,),), (0.0, 1.0))

    name: Literal["midpoint"] = "midpoint"


class Heun(RungeKutta):
    """Follows the mean of the slopes at both ends of each interval; `heun2` of torchdiffeq.

    Order 2, two evaluations per step.
    """

    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = Tableau((1.0,), ((1.0,),), (1 / 2, 1 / 2))

    name: Literal["heun"] = "heun"


class RK4(RungeKutta):
    """Kutta's 3/8 rule, with nodes 0, 1/3, 2/3 and 1; `rk4` of torchdiffeq.

    Order 4, four evaluations per step.

    Source: Hairer, Norsett and Wanner, Table II.1.2.
    """

    order: ClassVar[int] = 4
    tableau: ClassVar[Tableau] = Tableau(
        nodes=(1 / 3, 2 / 3, 1.0),
        coefficients=((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        weights=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    )

    name: Literal["rk4"] = "rk4"
