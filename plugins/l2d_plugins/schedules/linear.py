"""The straight path from noise to data."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from l2d_framework.schedule import Schedule


class Linear(Schedule):
    """x_t = t * clean + (1 - t) * noise.

    Source: Liu et al. 2022, arXiv:2209.03003; used by L2D, Cetin et al. 2025, arXiv:2501.15781.
    """

    name: Literal["linear"] = "linear"
    times: Literal["uniform", "cosmap"] = "uniform"
    """Distribution of training times; cosmap is that of Esser et al. 2024, arXiv:2403.03206, section 3.1."""
    minimum_noise: float = Field(default=0.0, ge=0, lt=1)
    """Share of the time axis next to the data that training never visits; above 0 where the last times are too easy."""
    velocity_scaling: Literal["constant", "edm"] = "constant"
    """How the distance to the clean state becomes a slope: divided by 1 - t, or by its square."""

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return t

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    @override
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t)
        return one, -one

    @override
    def velocity(self, x: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """(clean - x) / (1 - t), which equals the general formula with fewer roundings, or the same over (1 - t)^2."""
        left = 1 - t[..., None]
        return (clean - x) / (left.square() if self.velocity_scaling == "edm" else left)

    @override
    def sample_times(self, u: Tensor) -> Tensor:
        t = u if self.times == "uniform" else 1 - 1 / (torch.tan(u * (math.pi / 2)) + 1)
        return t * (1 - self.minimum_noise)
