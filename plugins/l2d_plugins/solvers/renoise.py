"""Re-noising, the sampler of TESS 2."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from typing_extensions import override

from l2d_framework.solver import Problem, Solver, as_time


class Renoise(Solver):
    """Jumps to the clean estimate and adds noise afresh up to the next level, x_s = alpha(s) clean + sigma(s) noise.

    One evaluation per step. With `deterministic`, the noise is the one that leads from the estimate to the present
    state, as in DDIM (arXiv:2010.02502), instead of a fresh one; where no noise is left it stays at the estimate.

    Source: arXiv:2502.13917, Eq. 4; the deterministic variant from the released code, which divides by zero at the end.
    """

    name: Literal["renoise"] = "renoise"
    deterministic: bool = False
    """Keep to the noise of the present state instead of a fresh one: less variety, and no dependence on the seed but
    through the first noise."""

    @property
    @override
    def is_stochastic(self) -> bool:
        return not self.deterministic

    @override
    def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
        clean, times = problem.clean(x, t), as_time(s, x)
        if not self.deterministic:
            return problem.schedule.interpolate(clean, problem.fresh_noise(x), times)
        if t >= 1:
            return clean
        return problem.schedule.interpolate(clean, problem.schedule.noise(x, clean, as_time(t, x)), times)
