"""Schedule: the scalar law of noise, and when training and sampling visit it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from l2d_framework.component import Component


class ScheduleConfig(Component):
    """Configuration of a law of noise; `build` makes the law of one model."""

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def build(self) -> NoiseLaw:
        """Make the law.

        Returns:
            This component itself where nothing is learned (`Schedule`); else a module that owns what is.
        """


class NoiseLaw(ABC):
    """x_t = alpha(t) * clean + sigma(t) * noise, with t from 0 (noise) to 1 (data).

    A law that learns is an `nn.Module` too: its state dict is part of every checkpoint, and `observe` lets it hear the
    loss of each update.
    """

    @property
    @abstractmethod
    def config(self) -> ScheduleConfig:
        """The component this law was built from."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the clean state.

        Args:
            t: times in [0, 1], any shape, float.

        Returns:
            Same shape and dtype as `t`; increasing, 1 at t = 1.
        """

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise.

        Args:
            t: times in [0, 1], any shape, float.

        Returns:
            Same shape and dtype as `t`; decreasing, 0 at t = 1.
        """

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes of alpha and sigma, by forward-mode differentiation unless a schedule knows them in closed form.

        Args:
            t: times in [0, 1], any shape, float.

        Returns:
            (alpha', sigma'), each of the shape of `t`, per unit of time.
        """
        one = torch.ones_like(t)
        return (torch.func.jvp(self.alpha, (t,), (one,))[1], torch.func.jvp(self.sigma, (t,), (one,))[1])

    def interpolate(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """State at time t on the path from `noise` to `clean`.

        Args:
            clean: (B, L, D), float.
            noise: (B, L, D), already scaled by the prior's standard deviation.
            t: (B, L).

        Returns:
            (B, L, D).
        """
        return self.alpha(t)[..., None] * clean + self.sigma(t)[..., None] * noise

    def noise(self, x: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """Noise that leads from `clean` to `x` at time t.

        Args:
            x: (B, L, D), float.
            clean: (B, L, D).
            t: times below 1, (B, L).

        Returns:
            (B, L, D).
        """
        return (x - self.alpha(t)[..., None] * clean) / self.sigma(t)[..., None]

    def velocity(self, x: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """Slope of the path through `x` that ends in `clean`.

        Computes alpha'(t) * clean + sigma'(t) * (x - alpha(t) * clean) / sigma(t).

        Args:
            x: noisy state, (B, L, D), float.
            clean: estimate of the clean state, (B, L, D), same dtype as `x`.
            t: times in [0, 1), (B, L).

        Returns:
            dx/dt, (B, L, D), in state units per unit of time.

        Source: Lipman et al. 2023, arXiv:2210.02747.
        """
        d_alpha, d_sigma = self.derivatives(t)
        return d_alpha[..., None] * clean + d_sigma[..., None] * self.noise(x, clean, t)

    def sample_times(self, u: Tensor) -> Tensor:
        """Training times from uniform numbers.

        Args:
            u: numbers in [0, 1), any shape.

        Returns:
            Times in [0, 1], same shape, rising or falling with `u`; the identity unless a schedule says otherwise.
        """
        return u

    def fixed_times(self, u: Tensor) -> Tensor:
        """Times that stay the same while a schedule learns, for held-out losses that are compared.

        Args:
            u: numbers in [0, 1), any shape.

        Returns:
            Times in [0, 1], same shape; the training times unless these are learned.
        """
        return self.sample_times(u)

    def observe(self, t: Tensor, loss: Tensor) -> None:  # noqa: B027 - most laws have nothing to learn
        """Hear the losses of one update, once after it and the same in every process; only modules are told.

        Args:
            t: time of every draw of all processes, (N,), float32.
            loss: its cross-entropy in nats, without the weight, (N,), float32.
        """

    def weight(self, t: Tensor) -> Tensor | None:
        """Weight of a token's cross-entropy in the training loss.

        Args:
            t: training times, any shape.

        Returns:
            Same shape, finite and not negative; None, the default, where every weight is 1.
        """
        return None

    def noisier(self, t: Tensor) -> Tensor:
        """Times one step nearer to the noise, at which training makes the prediction it conditions itself on.

        Args:
            t: times in [0, 1], any shape.

        Returns:
            Times in [0, 1], same shape; 1/1000 less unless a schedule has steps of its own.
        """
        return (t - 1e-3).clamp_min(0)

    def grid(self, count: int, end: float) -> list[float]:
        """Times at which sampling stops, from the prior to the read-out.

        Args:
            count: number of times, at least 1.
            end: last time, in (0, 1].

        Returns:
            `count` increasing times; the first is where the state is pure noise.
        """
        return [float(v) for v in torch.linspace(0.0, end, count)]


class Schedule(NoiseLaw, ScheduleConfig):
    """A law that learns nothing, and is therefore its own configuration."""

    @property
    @override
    def config(self) -> ScheduleConfig:
        return self

    @override
    def build(self) -> Self:
        return self
