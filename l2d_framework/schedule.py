"""Schedule: the scalar law of noise."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from l2d_framework.component import Component


class Schedule(Component):
    """x_t = alpha(t) * clean + sigma(t) * noise, with t from 0 (noise) to 1 (data); owns no weights."""

    kind: ClassVar[str] = "schedule"

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
