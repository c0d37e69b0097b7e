"""Time uniform in measured information: as much cross-entropy falls between any two neighbouring times."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from l2d_framework.schedule import NoiseLaw, ScheduleConfig
from l2d_plugins.schedules.cosine import Cosine
from l2d_plugins.schedules.linear import Linear

_TRUSTED = 20
"""Draws per knot at which measurement and uniform times count alike."""
_CUT_OFF = 1e-5
"""Share of either tail of the Gumbel distribution that is never visited."""


class Information(ScheduleConfig):
    """Alpha and sigma of a base schedule, visited so that the cross-entropy falls linearly, in training and sampling.

    Until enough losses have been heard, what is fitted is uniform times. Held-out losses are taken at the times of the
    base. Two runs whose updates saw the same losses have the same times, whatever the micro-batches and processes.

    Source: Dieleman et al. 2022, arXiv:2211.15089, section 4 (time warping); arXiv:2604.11748 (Gumbel).
    """

    name: Literal["information"] = "information"
    base: Annotated[Linear | Cosine, Field(discriminator="name")] = Linear()
    family: Literal["piecewise", "gumbel"] = "piecewise"
    """What is fitted to the cross-entropy over t: a falling piecewise-linear function, or the distribution function of
    a Gumbel variable with location and scale over log(sigma^2 / alpha^2)."""
    knots: int = Field(default=256, ge=2)
    """Pieces between t = 0 and the last training time, in which losses are averaged."""
    memory: int = Field(default=1000, ge=1)
    """Updates over which they are averaged."""
    uniform: float = Field(default=0.05, gt=0, le=1)
    """Share of the times that stays uniform, so that no time is ever given up."""

    @override
    def build(self) -> InformationLaw:
        return InformationLaw(self)


class InformationLaw(nn.Module, NoiseLaw):
    """Module of `Information`.

    Args:
        config: its configuration.
    """

    statistics: Tensor
    """Decaying sums of losses and of draws at each knot, (2, knots + 1), float32."""

    def __init__(self, config: Information) -> None:
        super().__init__()
        self._config = config
        # On the host even where shapes are made on the meta device; 1 - 2^-24 is the float32 below 1.
        ends = torch.tensor([0.0, 1 - 2**-24], device="cpu")
        self._last = float(config.base.sample_times(ends).max())
        self._places = torch.linspace(0, 1, config.knots + 1, dtype=torch.float64, device="cpu")
        self.register_buffer("statistics", torch.zeros(2, config.knots + 1))

    @property
    @override
    def config(self) -> Information:
        return self._config

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return self._config.base.alpha(t)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return self._config.base.sigma(t)

    @override
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._config.base.derivatives(t)

    @override
    def velocity(self, x: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        return self._config.base.velocity(x, clean, t)

    @override
    def weight(self, t: Tensor) -> Tensor | None:
        return self._config.base.weight(t)

    @override
    def noisier(self, t: Tensor) -> Tensor:
        return torch.minimum(self._config.base.noisier(t), t)

    @override
    def fixed_times(self, u: Tensor) -> Tensor:
        return self._config.base.sample_times(u)

    @override
    def sample_times(self, u: Tensor) -> Tensor:
        return _interpolated(u, self.share(), self._last * self._places)

    @override
    def grid(self, count: int, end: float) -> list[float]:
        if count == 1:
            return self._config.base.grid(1, end)
        share, times = self.share(), self._last * self._places
        whole = _interpolated(torch.tensor([end], dtype=torch.float64), times, share)
        inner = torch.arange(1, count - 1, dtype=torch.float64, device="cpu") / (count - 1)
        return [0.0, *_interpolated(whole * inner, share, times).tolist(), end]

    @override
    @torch.no_grad()
    def observe(self, t: Tensor, loss: Tensor) -> None:
        place = (t / self._last).clamp(0, 1) * self._config.knots
        low = place.long().clamp_max(self._config.knots - 1)
        sound = loss.isfinite()
        pair = torch.stack([loss.where(sound, 0), sound]).to(self.statistics)
        right = (place - low).to(self.statistics)
        self.statistics.mul_(1 - 1 / self._config.memory)
        self.statistics.index_add_(1, low, pair * (1 - right)).index_add_(1, low + 1, pair * right)

    def share(self) -> Tensor:
        """Share of the information that lies before each knot, by the family's fit and the uniform share.

        Returns:
            Rising strictly from 0 to 1, (knots + 1,), float64, on the host.
        """
        fit = self._measured() if self._config.family == "piecewise" else self._fitted()
        return (1 - self._config.uniform) * fit + self._config.uniform * self._places

    def gumbel(self) -> tuple[float, float]:
        """Location and scale of the Gumbel distribution of log(sigma^2 / alpha^2) that is closest to the measurement.

        The line through the quantiles of both, from 5 to 95 percent of the information.

        Returns:
            Both numbers.
        """
        quantiles = torch.arange(1, 20, dtype=torch.float64, device="cpu") / 20
        times = _interpolated(quantiles, self._measured(), self._last * self._places)
        wanted, found = -(-(1 - quantiles).log()).log(), self._noise_to_signal(times.clamp(1e-4, 1 - 1e-4))
        wanted_mean, found_mean = wanted.mean(), found.mean()
        scale = ((wanted - wanted_mean) * (found - found_mean)).sum() / (wanted - wanted_mean).square().sum()
        scale = scale.clamp_min(1e-3)
        return float(found_mean - scale * wanted_mean), float(scale)

    def _measured(self) -> Tensor:
        """Share of the fall in cross-entropy before each knot, as far as there are draws to trust."""
        sums, counts = self.statistics.double().cpu().unbind()
        if not counts.any():
            return self._places
        level = _falling(sums + 1e-3 * sums.sum() / counts.sum(), counts + 1e-3)
        trust = counts.sum() / (counts.sum() + _TRUSTED * self._config.knots)
        fall = level[0] - level[-1]
        shape: Tensor = (level[0] - level) / fall if fall > 0 else self._places
        between: Tensor = trust * shape + (1 - trust) * self._places
        return between

    def _fitted(self) -> Tensor:
        location, scale = self.gumbel()
        far = (self._noise_to_signal(self._last * self._places) - location) / scale
        share = ((-torch.expm1(-torch.exp(-far)) - _CUT_OFF) / (1 - 2 * _CUT_OFF)).clamp(0, 1)
        return (share - share[0]) / (share[-1] - share[0])

    def _noise_to_signal(self, t: Tensor) -> Tensor:
        return 2 * (self.sigma(t).log() - self.alpha(t).log())


def _falling(sums: Tensor, counts: Tensor) -> Tensor:
    """Means that never rise and are closest to the given ones in weighted squares: isotonic regression.

    At k the smallest, over all starts i <= k, of the largest mean from i to any end j >= k (Robertson et al. 1988,
    section 1.4).
    """
    total, mass = (torch.cat([v.new_zeros(1), v.cumsum(0)]) for v in (sums, counts))
    means = (total[None, 1:] - total[:-1, None]) / (mass[None, 1:] - mass[:-1, None])
    is_stretch = torch.ones_like(means, dtype=torch.bool).triu()
    largest = means.where(is_stretch, -math.inf).flip(1).cummax(1).values.flip(1)
    smallest: Tensor = largest.where(is_stretch, math.inf).amin(0)
    return smallest


def _interpolated(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """The rising piecewise-linear function through `values` at rising `places`, constant beyond them."""
    places, values = places.to(x), values.to(x)
    right = torch.searchsorted(places, x.contiguous(), right=True).clamp(1, len(places) - 1)
    before, after = values[right - 1], values[right]
    share = (x - places[right - 1]) / (places[right] - places[right - 1])
    return torch.minimum(before + share.clamp(0, 1) * (after - before), after)
