"""Solver: how the state moves from noise to data."""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from l2d_framework.component import Component
from l2d_framework.errors import ConfigError
from l2d_framework.schedule import NoiseLaw

Time = float | Tensor
"""A time shared by all tokens, or one per token, (B, L)."""


class Problem(Protocol):
    """The differential equation as a solver sees it; every call of `clean` or `velocity` costs one evaluation."""

    @property
    def schedule(self) -> NoiseLaw:
        """The noise law."""
        ...

    def clean(self, x: Tensor, t: Time, *, active: Tensor | None = None) -> Tensor:
        """Estimate of the clean state.

        Args:
            x: (B, L, D), float.
            t: time of `x`.
            active: tokens to evaluate, (B, L), bool; all when None. The others cost nothing.

        Returns:
            (B, L, D); zero where not active.
        """
        ...

    def velocity(self, x: Tensor, t: Time, *, active: Tensor | None = None) -> Tensor:
        """Slope dx/dt.

        Args:
            x: (B, L, D), float.
            t: time of `x`, below 1.
            active: tokens to evaluate, (B, L), bool; all when None. The others cost nothing.

        Returns:
            (B, L, D); zero where not active.
        """
        ...

    def fresh_noise(self, x: Tensor) -> Tensor:
        """New noise as `Parametrization.corrupt` takes it, at the scale of the start.

        Args:
            x: a state, for its shape.

        Returns:
            (B, L, D), with the prior's standard deviation.
        """
        ...


class Solver(Component):
    """A rule for moving; sees neither tokens, logits nor the network.

    A solver overrides `stages`, `order`, `is_stochastic` and `evaluates_end` by class variables, or by properties where
    they depend on its fields.

    Attributes:
        is_adaptive: chooses its own steps, so the number of evaluations is not known in advance.
        batch_coupled: a token's result may depend on its batch mates.
        gaussian_path: moves states x_t = alpha(t) * clean + sigma(t) * noise, by their slope or clean estimate; False
            for a rule of another space, such as unmasking, which serves parametrizations that declare the same.
    """

    kind: ClassVar[str] = "solver"
    is_adaptive: ClassVar[bool] = False
    batch_coupled: ClassVar[bool] = False
    gaussian_path: ClassVar[bool] = True

    @property
    def stages(self) -> int:
        """Evaluations that one `step` costs."""
        return 1

    @property
    def order(self) -> int:
        """Order of convergence of a deterministic method, at least.

        Halving the steps divides the error by 2 to this power or more, where alpha and sigma are positive.
        """
        return 1

    @property
    def is_stochastic(self) -> bool:
        """True when it draws fresh noise, so that order of convergence means nothing."""
        return False

    @property
    def evaluates_end(self) -> bool:
        """True when it needs the velocity at the end time, where it is singular if that is 1."""
        return False

    @abstractmethod
    def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
        """Move from time t to time s.

        Args:
            problem: the differential equation.
            x: state at t, (B, L, D), float.
            t: time of `x`.
            s: time to move to.

        Returns:
            State at s, (B, L, D).
        """

    def solve(self, problem: Problem, x: Tensor, times: list[float]) -> Tensor:
        """Move through all `times`.

        Args:
            problem: the differential equation.
            x: state at times[0], (B, L, D), float.
            times: increasing times.

        Returns:
            State at times[-1], (B, L, D).
        """
        for t, s in pairwise(times):
            x = self.step(problem, x, t, s)
        return x

    def grid_size(self, num_inference_steps: int) -> int:
        """How many times the grid must have to use exactly this many evaluations, the read-out included.

        Args:
            num_inference_steps: network evaluations, at least 1.

        Returns:
            Number of grid times; an adaptive solver only needs both ends and takes the number for its budget.

        Raises:
            ConfigError: if this solver cannot hit the number, or cannot make a single step with it; the message says
                which numbers it can use.
        """
        name, stages = self.component_name(), self.stages
        if self.is_adaptive:
            if num_inference_steps <= stages:
                raise ConfigError(
                    f"Solver {name!r} makes at least {stages} evaluations and one read-out; "
                    f"got num_inference_steps={num_inference_steps}. Use {stages + 1} or more, or null."
                )
            return 2
        steps, rest = divmod(num_inference_steps - 1, stages)
        if rest:
            low = steps * stages + 1
            raise ConfigError(
                f"Solver {name!r} makes {stages} evaluations a step and one read-out, so it cannot use "
                f"num_inference_steps={num_inference_steps}. Use {low} or {low + stages}."
            )
        return steps + 1

    def with_budget(self, evaluations: int) -> Self:
        """The same solver with another limit on the evaluations a token may cost.

        Args:
            evaluations: largest number of network evaluations, the read-out included.

        Returns:
            A solver that stops with an EvaluationBudgetError before it exceeds the limit; this one itself if the grid
            alone decides how many evaluations it makes.
        """
        return self


def as_time(t: Time, like: Tensor) -> Tensor:
    """Time as a tensor per token.

    Args:
        t: a number or (B, L).
        like: a state, (B, L, D).

    Returns:
        (B, L), type and device of `like`.
    """
    if isinstance(t, Tensor):
        return t.to(like.dtype)
    return torch.full(like.shape[:2], t, dtype=like.dtype, device=like.device)
