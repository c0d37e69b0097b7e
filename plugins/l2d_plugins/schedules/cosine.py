"""The cosine schedule of TESS 2."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from l2d_framework.schedule import Schedule

_OFFSET = 1e-4


class Cosine(Schedule):
    """alpha = sqrt(abar), sigma = sqrt(1 - abar) with abar(u) = f(u) / f(0), f(u) = cos^2((u + s) / (1 + s) pi / 2).

    Here u = 1 - t and s = 1e-4, so that t = 1 carries no noise at all. Index i of a table of N, as the authors count,
    is u = i / N: tables of any length are this one law, read at their own points.

    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 17, with the smaller offset of the TESS 2 code
    (arXiv:2502.13917).
    """

    name: Literal["cosine"] = "cosine"
    steps: int | None = Field(default=5000, ge=1)
    """T, number of training times i / T; any time is drawn when None."""

    @override
    def alpha(self, t: Tensor) -> Tensor:
        angle = ((1 - t) + _OFFSET) / (1 + _OFFSET) * (math.pi / 2)
        return angle.cos() / math.cos(_OFFSET / (1 + _OFFSET) * math.pi / 2)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        # The authors keep abar in float32, which is felt where little noise is left.
        return (1 - (self.alpha(t.double()) ** 2).float()).clamp_min(0).sqrt().to(t.dtype)

    @override
    def sample_times(self, u: Tensor) -> Tensor:
        """1 - i / T with i = floor(u T), or 1 - u without a table."""
        return 1 - u if self.steps is None else 1 - (u * self.steps).floor() / self.steps

    @override
    def noisier(self, t: Tensor) -> Tensor:
        """Times one step of the table nearer to the noise, the noisiest being its own neighbour."""
        if self.steps is None:
            return super().noisier(t)
        index = ((1 - t) * self.steps).round() + 1
        return 1 - index.clamp_max(self.steps - 1) / self.steps

    @override
    def grid(self, count: int, end: float) -> list[float]:
        """Times 1/N, 2/N, .., 1, all times `end`.

        The state at the first is pure noise, although the schedule has some signal there: the authors start so.
        """
        return [end * (i + 1) / count for i in range(count)]
