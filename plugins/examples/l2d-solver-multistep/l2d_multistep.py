"""Multistep solvers: second order at one evaluation a step, by what the step before has found."""

from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from l2d_framework import Problem, Solver, hookimpl
from l2d_framework.solver import Time, as_time


class DPMSolverPP2M(Solver):
    """DPM-Solver++(2M): the clean estimate in the middle of each step, extrapolated in lambda = log(alpha / sigma).

    Order 2, one evaluation per step, never at the end time. Where a step or the one before it is endless in lambda,
    which the first is from alpha = 0 and the last is to sigma = 0, there is no middle, and it is a step of DDIM.

    Source: Lu et al. 2022, arXiv:2211.01095, Algorithm 2.
    """

    order: ClassVar[int] = 2

    name: Literal["dpmpp_2m"] = "dpmpp_2m"

    def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
        """A step that has none before it, which is one of DDIM."""
        return self.solve(problem, x, [t, s])

    def solve(self, problem: Problem, x: Tensor, times: list[float]) -> Tensor:
        """Move with what is remembered in local variables: one solver serves many threads, and changes in none."""
        schedule, before = problem.schedule, None
        for t, s in pairwise(times):
            clean, h = problem.clean(x, t), self._log_snr(problem, x, s) - self._log_snr(problem, x, t)
            middle = clean
            if before is not None:
                earlier, last = before
                share = torch.nan_to_num(h / (2 * last), nan=0.0, posinf=0.0)
                middle = clean + share[..., None] * (clean - earlier)
            before = clean, h
            # sigma_s / sigma_t * x + alpha_s * (1 - exp(-h)) * middle, written so that it has limits at both ends.
            x = schedule.interpolate(middle, schedule.noise(x, middle, as_time(t, x)), as_time(s, x))
        return x

    def _log_snr(self, problem: Problem, x: Tensor, t: Time) -> Tensor:
        time = as_time(t, x)
        return (problem.schedule.alpha(time) / problem.schedule.sigma(time)).log()


class AdamsBashforth2(Solver):
    """Adams-Bashforth 2: the slope in the middle of each step, extrapolated in t from it and the one before.

    Order 2, one evaluation per step, never at the end time. The first step is Euler's.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, sections III.1 and III.5.
    """

    order: ClassVar[int] = 2

    name: Literal["ab2"] = "ab2"

    def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
        """A step that has none before it, which is one of Euler's."""
        return self.solve(problem, x, [t, s])

    def solve(self, problem: Problem, x: Tensor, times: list[float]) -> Tensor:
        """Move with what is remembered in local variables."""
        before = None
        for t, s in pairwise(times):
            slope, h = problem.velocity(x, t), s - t
            middle = slope
            if before is not None:
                earlier, last = before
                middle = slope + h / (2 * last) * (slope - earlier)
            before = slope, h
            x = x + h * middle
        return x


@hookimpl
def l2d_components() -> list[type[Solver]]:
    """Offer the components of this package."""
    return [DPMSolverPP2M, AdamsBashforth2]
