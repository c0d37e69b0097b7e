"""Runge-Kutta methods of torchdiffeq, installed by the extra `solvers-rk`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from l2d_framework.component import Component
from l2d_framework.errors import EvaluationBudgetError, L2DError
from l2d_framework.hooks import hookimpl
from l2d_framework.solver import Problem, Solver
from l2d_plugins.solvers.adaptive import Adaptive

_FIXED = {"euler": (1, 1), "midpoint": (2, 2), "heun2": (2, 2), "heun3": (3, 3), "rk4": (4, 4)}
_ADAPTIVE = {"dopri5": (7, 5), "dopri8": (14, 8), "bosh3": (4, 3), "fehlberg2": (3, 2), "adaptive_heun": (2, 2)}
"""Evaluations of one step and order, by torchdiffeq's name."""


class _TorchDiffEq(Solver):
    """What both kinds share: all tokens of a batch are one state to torchdiffeq."""

    batch_coupled: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("torchdiffeq",)
    extra: ClassVar[str] = "l2d-framework[solvers-rk]"


class TorchDiffEqFixed(_TorchDiffEq):
    """A fixed-step method, one step per interval of the grid."""

    name: Literal["torchdiffeq_fixed"] = "torchdiffeq_fixed"
    method: Literal["euler", "midpoint", "heun2", "heun3", "rk4"] = "midpoint"
    """torchdiffeq's name of the method; evaluations per step: euler 1, midpoint and heun2 2, heun3 3, rk4 4."""

    @property
    @override
    def stages(self) -> int:
        return _FIXED[self.method][0]

    @property
    @override
    def order(self) -> int:
        return _FIXED[self.method][1]

    @property
    @override
    def evaluates_end(self) -> bool:
        return self.method in ("heun2", "rk4")

    @override
    def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
        return _odeint(lambda time, state: problem.velocity(state, float(time)), x, [t, s], method=self.method)


class TorchDiffEqAdaptive(Adaptive, _TorchDiffEq):
    """An adaptive method whose step size is shared by the whole batch, which one difficult token slows down for all.

    Steps may overshoot the end, from where torchdiffeq interpolates back; beyond t = 1 the velocity counts as zero, as
    in the released L2D code.
    """

    evaluates_end: ClassVar[bool] = True

    name: Literal["torchdiffeq_adaptive"] = "torchdiffeq_adaptive"
    method: Literal["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"] = "dopri5"
    """torchdiffeq's name of the method; of low order where tolerances are loose, as language needs no many digits."""

    @property
    @override
    def stages(self) -> int:
        return _ADAPTIVE[self.method][0]

    @property
    @override
    def order(self) -> int:
        return _ADAPTIVE[self.method][1]

    @override
    def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
        return self.solve(problem, x, [t, s])

    @override
    def solve(self, problem: Problem, x: Tensor, times: list[float]) -> Tensor:
        used = 1  # the read-out

        def slope(time: Tensor, state: Tensor) -> Tensor:
            nonlocal used
            now = float(time)
            if now >= 1:
                return torch.zeros_like(state)
            used += 1
            if used > self.max_evaluations:
                raise self._exhausted(now)
            return problem.velocity(state, now)

        control = {"rtol": self.rtol, "atol": self.atol, "options": {"first_step": self.first_step}}
        return _odeint(slope, x, times, method=self.method, **control)

    def _exhausted(self, time: float) -> EvaluationBudgetError:
        return EvaluationBudgetError(
            f"Solver {self.component_name()!r} with method {self.method!r} may use {self.max_evaluations} evaluations, "
            f"read-out included, and needs more; all tokens of the batch share its steps and reached t = {time:.6g}. "
            f"Raise the tolerances (rtol={self.rtol:g}, atol={self.atol:g}), raise max_evaluations or "
            "num_inference_steps, or use a solver with steps per token such as 'fehlberg2'."
        )


def _odeint(slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: list[float], **arguments: Any) -> Tensor:
    from torchdiffeq import odeint

    if len(times) < 2:
        return x
    grid = torch.tensor(times, dtype=torch.float64, device=x.device)
    try:
        states: Tensor = odeint(slope, x, grid, **arguments)
    except AssertionError as error:
        problem = str(error)
        if not problem.startswith(("underflow in dt", "non-finite values")):
            raise
        raise L2DError(
            f"torchdiffeq's {arguments['method']!r} gave up between t = {times[0]:g} and {times[-1]:g}: "
            f"{problem.splitlines()[0]}. The velocity is too steep for the tolerances or not finite; raise rtol="
            f"{arguments['rtol']:g} and atol={arguments['atol']:g}, end earlier, or use a fixed-step solver."
        ) from error
    return states[-1]


@hookimpl
def l2d_components() -> list[type[Component]]:
    """Solvers of this package that need the extra."""
    return [TorchDiffEqFixed, TorchDiffEqAdaptive]
