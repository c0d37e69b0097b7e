"""Time uniform in measured information: as much cross-entropy falls between any two neighbouring times."""

from __future__ import annotations

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
_CAUTION = 2
"""Standard errors by which noise may lower a sum of losses and not be taken for a fall."""
_CUT_OFF = 1e-5
"""Share of either tail of the Gumbel distribution that is never visited."""


class Information(ScheduleConfig):
    """Alpha and sigma of a base schedule, visited so that the cross-entropy falls linearly, in training and sampling.

    As far as the fall could be noise, times are uniform. Held-out losses are taken at the times of the base. Two runs
    whose updates saw the same losses have the same times, whatever the micro-batches and processes.

    Source: Dieleman et al. 2022, arXiv:2211.15089, section 4 (time warping); arXiv:2604.11748 (Gumbel).
    """

    name: Literal["information"] = "information"
    base: Annotated[Linear | Cosine, Field(discriminator="name")] = Linear()
    """Schedule whose alpha and sigma these are; that of the method, such as `cosine` for TESS 2."""
    family: Literal["piecewise", "gumbel"] = "piecewise"
    """What is fitted to the cross-entropy over t: a falling piecewise-linear function, or the distribution function of
    a Gumbel variable with location and scale over log(sigma^2 / alpha^2)."""
    knots: int = Field(default=256, ge=2, le=4096)
    """Pieces between t = 0 and the last training time, in which losses are averaged."""
    memory: int = Field(default=1000, ge=1)
    """Updates over which they are averaged."""
    uniform: float = Field(default=0.05, gt=0, le=1)
    """Share of the times that stays uniform, so that no time is ever given up."""

    @override
    def build(self) -> InformationLaw:
        return InformationLaw(self)


class InformationLaw(nn.Module, NoiseLaw):
    """Module of `Information`."""

    statistics: Tensor
    """Decaying sums over updates, at each knot, of an update's weighted losses l, of its weights w, and of l^2, l w and
    w^2; (5, knots + 1), float64. State, but no buffer: it stays on the host and as precise wherever the model goes.
    """

    def __init__(self, config: Information) -> None:
        super().__init__()
        self._config = config
        # On the host even where shapes are made on the meta device; 1 - 2^-24 is the float32 below 1.
        ends = torch.tensor([0.0, 1 - 2**-24], device="cpu")
        self._last = float(config.base.sample_times(ends).max())
        self._places = torch.linspace(0, 1, config.knots + 1, dtype=torch.float64, device="cpu")
        self.statistics = torch.zeros(5, config.knots + 1, dtype=torch.float64, device="cpu")
        self._fit: tuple[Tensor, Tensor] | None = None

    @override
    def get_extra_state(self) -> Tensor:
        return self.statistics

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self.statistics.copy_(state)

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
        place = (t.cpu().double() / self._last).clamp(0, 1) * self._config.knots
        low = place.long().clamp_max(self._config.knots - 1)
        right = place - low
        loss = loss.cpu().double()
        sound = loss.isfinite()
        # By one over the density of the draws: else a knot that is hardly visited any more would go on showing losses
        # of long ago beside new ones of its neighbours.
        weight = (self._places.diff() / self.share().diff())[low] * sound
        index = torch.cat([low, low + 1])
        total, mass = (
            torch.bincount(index, torch.cat([v * (1 - right), v * right]), self._config.knots + 1)
            for v in (weight * loss.where(sound, 0), weight)
        )
        kept = 1 - 1 / self._config.memory
        sums, squares = self.statistics.split([2, 3])
        sums.mul_(kept).add_(torch.stack([total, mass]))
        # The variance of a sum that decays does so twice as fast.
        squares.mul_(kept**2).add_(torch.stack([total * total, total * mass, mass * mass]))

    def share(self) -> Tensor:
        """Share of the information before each knot, rising strictly from 0 to 1, (knots + 1,), float64 on the host."""
        # By content, since whoever loads a checkpoint writes into the state dict.
        if self._fit is None or not torch.equal(self._fit[0], self.statistics):
            shape, trust = self._measured()
            if self._config.family == "gumbel" and trust:
                shape = self._fitted(shape)
            weight = (1 - self._config.uniform) * trust
            self._fit = self.statistics.clone(), weight * shape + (1 - weight) * self._places
        return self._fit[1]

    def gumbel(self, shape: Tensor | None = None) -> tuple[float, float]:
        """Location and scale of the Gumbel distribution of log(sigma^2 / alpha^2) that is closest to the measurement.

        The line through the quantiles of both, from 5 to 95 percent of the information.
        """
        shape = self._measured()[0] if shape is None else shape
        quantiles = torch.arange(1, 20, dtype=torch.float64, device="cpu") / 20
        times = _interpolated(quantiles, shape, self._last * self._places)
        gumbel, measured = -(-(1 - quantiles).log()).log(), self._noise_to_signal(times.clamp(1e-4, 1 - 1e-4))
        off, mean = gumbel - gumbel.mean(), measured.mean()
        scale = ((off * (measured - mean)).sum() / off.square().sum()).clamp_min(1e-3)
        return float(mean - scale * gumbel.mean()), float(scale)

    def _measured(self) -> tuple[Tensor, float]:
        """Share of the fall in cross-entropy before each knot, and how far to trust it, from 0 to 1.

        The means that never rise and are closest to the measured ones when their whole fall costs a penalty, which is
        what noise may do to a sum of losses: noise about one level makes no fall. The penalty lowers the first sum and
        raises the last. What an update says about a knot is one reading, since its draws may share their noise.
        """
        mass = self.statistics[1].sum()
        if not mass:
            return self._places, 0.0
        sums, counts, squares, crossed, weights = self.statistics
        sums, counts = sums + 1e-3 * sums.sum() / mass, counts + 1e-3
        level = _falling(sums, counts)
        variance = (squares - 2 * level * crossed + level * level * weights).sum()
        # At least that of 1e-4 nats: losses without any noise, as before the first update, are rounded.
        penalty = _CAUTION * variance.clamp_min(1e-8 * weights.sum()).sqrt()
        sums[0] -= penalty
        sums[-1] += penalty
        level = _falling(sums, counts)
        fall = level[0] - level[-1]
        if fall <= 0:
            return self._places, 0.0
        lost = penalty / counts[level == level[0]].sum() + penalty / counts[level == level[-1]].sum()
        heard = mass / (mass + _TRUSTED * self._config.knots)
        return (level[0] - level) / fall, float(heard * fall**2 / (fall**2 + lost**2))

    def _fitted(self, shape: Tensor) -> Tensor:
        location, scale = self.gumbel(shape)
        far = (self._noise_to_signal(self._last * self._places) - location) / scale
        share = ((-torch.expm1(-torch.exp(-far)) - _CUT_OFF) / (1 - 2 * _CUT_OFF)).clamp(0, 1)
        return (share - share[0]) / (share[-1] - share[0])

    def _noise_to_signal(self, t: Tensor) -> Tensor:
        return 2 * (self.sigma(t).log() - self.alpha(t).log())


def _falling(sums: Tensor, counts: Tensor) -> Tensor:
    """Means that never rise and are closest to the given ones in weighted squares, by pooling adjacent violators."""
    pools: list[tuple[float, float, int]] = []
    for total, mass in zip(sums.tolist(), counts.tolist(), strict=True):
        length = 1
        while pools and pools[-1][0] * mass <= total * pools[-1][1]:
            before = pools.pop()
            total, mass, length = total + before[0], mass + before[1], length + before[2]
        pools.append((total, mass, length))
    means = torch.tensor([total / mass for total, mass, _ in pools], dtype=torch.float64, device="cpu")
    return means.repeat_interleave(torch.tensor([length for *_, length in pools], device="cpu"))


def _interpolated(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """The rising piecewise-linear function through `values` at rising `places`, constant beyond them."""
    places, values = places.to(x), values.to(x)
    right = torch.searchsorted(places, x.contiguous(), right=True).clamp(1, len(places) - 1)
    before, after = values[right - 1], values[right]
    share = (x - places[right - 1]) / (places[right] - places[right - 1])
    return torch.minimum(before + share.clamp(0, 1) * (after - before), after)
