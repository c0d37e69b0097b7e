"""Adaptive Runge-Kutta pairs in which every token chooses its own steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from l2d_framework.errors import EvaluationBudgetError
from l2d_framework.solver import Problem, Solver

_SAFETY, _SMALLEST_FACTOR, _LARGEST_FACTOR = 0.9, 0.2, 10.0


@dataclass(frozen=True)
class Tableau:
    """Coefficients of an embedded pair whose last stage serves as the first of the next step.

    Attributes:
        nodes: where each stage but the first stands in the step, 0 to 1.
        coefficients: weights of the earlier slopes in the state of each stage but the first.
        weights: weights of all slopes in the step.
        errors: the same minus the weights of the embedded method.
    """

    nodes: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    errors: tuple[float, ...]


class EmbeddedPair(Solver):
    """Integrates each token with its own time, step size and error estimate, so that none feels its neighbours.

    A token's step is accepted when the root mean square over D of error / (atol + rtol * |state|) is at most 1. The
    step-size rule and its constants are torchdiffeq's; unlike there, the last step is shortened to land on the end.
    Estimates are asked for at the temperature of the time itself, as the released L2D code does for adaptive methods.
    """

    is_adaptive: ClassVar[bool] = True
    evaluates_end: ClassVar[bool] = True
    tableau: ClassVar[Tableau]

    rtol: float = Field(3e-4, gt=0, allow_inf_nan=False)
    """Error allowed per step, relative to the state."""
    atol: float = Field(3e-4, gt=0, allow_inf_nan=False)
    """Error allowed per step, in state units."""
    first_step: float = Field(0.05, gt=0, le=1)
    """Length of the first attempted step, in units of time."""
    max_evaluations: int = Field(1000, ge=5)
    """Evaluations a token may cost, the read-out included."""

    @property
    def stages(self) -> int:
        """Evaluations that one `step` costs; in `solve`, every step but the first costs one less."""
        return len(self.tableau.weights)

    def with_budget(self, evaluations: int) -> Self:
        """The same solver with another `max_evaluations`.

        Args:
            evaluations: largest number of network evaluations per token, the read-out included.

        Returns:
            A changed copy.
        """
        return self.model_copy(update={"max_evaluations": evaluations})

    def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
        """Move all tokens from time t to time s in one step, whatever its error.

        Args:
            problem: the differential equation.
            x: state at t, (B, L, D), float32.
            t: time of `x`.
            s: time to move to.

        Returns:
            State at s, (B, L, D).
        """
        start, end = (torch.full(x.shape[:2], time, dtype=x.dtype, device=x.device) for time in (t, s))
        slopes = self._slopes(problem, x, problem.velocity(x, t), (start, end), active=None)
        return x + (s - t) * _combine(self.tableau.weights, slopes)

    def solve(self, problem: Problem, x: Tensor, times: list[float]) -> Tensor:
        """Move every token through all `times`, in as many steps as its error estimate asks for.

        Args:
            problem: the differential equation.
            x: state at times[0], (B, L, D), float32.
            times: increasing times; each is landed on.

        Returns:
            State at times[-1], (B, L, D).

        Raises:
            EvaluationBudgetError: if a token would need more evaluations than `max_evaluations`.
        """
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
            slopes = self._slopes(problem, x, first, (t, s), active=active)
            width = (s - t)[..., None]
            proposal = x + width * _combine(self.tableau.weights, slopes)
            tolerance = self.atol + self.rtol * torch.maximum(x.abs(), proposal.abs())
            ratio = (width * _combine(self.tableau.errors, slopes) / tolerance).square().mean(-1).sqrt()
            accepted = active & (ratio <= 1)
            h = (s - t) * self._growth(ratio)
            x = torch.where(accepted[..., None], proposal, x)
            first = torch.where(accepted[..., None], slopes[-1], first)
            t = torch.where(accepted, s, t)
            reached = reached + (accepted & (s == end))
        return x

    def _slopes(
        self, problem: Problem, x: Tensor, first: Tensor, interval: tuple[Tensor, Tensor], *, active: Tensor | None
    ) -> list[Tensor]:
        t, s = interval
        slopes = [first]
        for node, row in zip(self.tableau.nodes, self.tableau.coefficients, strict=True):
            state = x + (s - t)[..., None] * _combine(row, slopes)
            # t + (s - t) may round to beyond s.
            slopes.append(problem.velocity(state, s if node == 1 else t + node * (s - t), active=active))
        return slopes

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


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return reduce(torch.add, (weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight))
