"""Adaptive Runge-Kutta pairs in which every token chooses its own steps."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from l2d_framework.errors import EvaluationBudgetError
from l2d_framework.solver import Problem, Solver
from l2d_plugins.solvers.runge_kutta import RungeKutta, Tableau, combine

_SAFETY, _SMALLEST_FACTOR, _LARGEST_FACTOR = 0.9, 0.2, 10.0


class Adaptive(Solver):
    """How exact the steps of a solver that chooses them are to be, and what they may cost."""

    is_adaptive: ClassVar[bool] = True

    rtol: float = Field(3e-4, gt=0, allow_inf_nan=False)
    """Error allowed per step, relative to the state; raise it for fewer evaluations, lower it for a finer path."""
    atol: float = Field(3e-4, gt=0, allow_inf_nan=False)
    """Error allowed per step, in units of the state; raise it along with `rtol`."""
    first_step: float = Field(0.05, gt=0, le=1)
    """Length of the first attempted step, in units of time, of which there is 1 from noise to data."""
    max_evaluations: int = Field(1000, ge=2)
    """Evaluations a token may cost, the read-out included; a solve that needs more stops with an error."""

    @override
    def with_budget(self, evaluations: int) -> Self:
        return self.model_copy(update={"max_evaluations": evaluations})


class EmbeddedPair(Adaptive, RungeKutta):
    """Integrates each token with its own time, step size and error estimate, so that none feels its neighbours.

    The last stage of a step serves as the first of the next, so every step but the first costs one evaluation less.
    A token's step is accepted when the root mean square over D of error / (atol + rtol * |state|) is at most 1. The
    step-size rule and its constants are torchdiffeq's; unlike there, the last step is shortened to land on the end.
    """

    @override
    def solve(self, problem: Problem, x: Tensor, times: list[float]) -> Tensor:
        grid = torch.tensor(times, dtype=x.dtype, device=x.device)
        reached = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        t, h = torch.full_like(x[..., 0], times[0]), torch.full_like(x[..., 0], self.first_step)
        first, used = None, 0
        # Tokens that are still on their way have all tried the same number of steps, so one counter serves them all.
        while bool((active := reached < len(times) - 1).any()):
            used += self.stages if first is None else self.stages - 1
            if used >= self.max_evaluations:
                raise self._exhausted(active, t, h)
            if first is None:
                first = problem.velocity(x, times[0])
            end = grid[(reached + 1).clamp(max=len(times) - 1)]
            s = torch.minimum(t + h, end)
            slopes = self._slopes(problem, x, first, (t, s), active)
            width = (s - t)[..., None]
            proposal = x + width * combine(self.tableau.weights, slopes)
            tolerance = self.atol + self.rtol * torch.maximum(x.abs(), proposal.abs())
            ratio = (width * combine(self.tableau.errors, slopes) / tolerance).square().mean(-1).sqrt()
            accepted = active & (ratio <= 1)
            h = (s - t) * self._growth(ratio)
            x = torch.where(accepted[..., None], proposal, x)
            first = torch.where(accepted[..., None], slopes[-1], first)
            t = torch.where(accepted, s, t)
            reached = reached + (accepted & (s == end))
        return x

    def _growth(self, ratio: Tensor) -> Tensor:
        # In float64, because a vectorised float32 power rounds differently from a scalar one, and a token's step must
        # not depend on how many tokens stand beside it.
        ideal = _SAFETY / ratio.double() ** (1 / self.order)
        # A NaN, from a velocity that is not finite, counts as the largest error.
        factor = ideal.nan_to_num(nan=0.0).clamp(_SMALLEST_FACTOR, _LARGEST_FACTOR).to(ratio.dtype)
        return torch.where(ratio <= 1, factor.clamp(min=1.0), factor)

    def _exhausted(self, active: Tensor, t: Tensor, h: Tensor) -> EvaluationBudgetError:
        row, token = active.nonzero()[0].tolist()
        return EvaluationBudgetError(
            f"Solver {self.component_name()!r} may use {self.max_evaluations} evaluations a token, read-out included; "
            f"{int(active.sum())} of {active.numel()} tokens need more. The first, row {row}, position {token}, "
            f"reached t = {t[row, token]:.6g} and would next try a step of {h[row, token]:.3g}. Raise the tolerances "
            f"(rtol={self.rtol:g}, atol={self.atol:g}), raise max_evaluations or num_inference_steps, or use a "
            "fixed-step solver such as 'midpoint'."
        )


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
