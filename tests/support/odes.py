"""Differential equations with known solutions, which count their evaluations token by token."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]


class Ode:
    """dx/dt = field(x, t) for tokens that do not see each other.

    `evaluations` counts them per token, (B, L); `visits` lists the time of every call as given.
    """

    def __init__(self, field: Field) -> None:
        self.field = field
        self.evaluations = torch.zeros(1, dtype=torch.int64)
        self.visits: list[float | Tensor] = []

    def velocity(self, x, t, *, active=None):
        self.evaluations = self.evaluations + (torch.ones(x.shape[:2]) if active is None else active).long()
        self.visits.append(t)
        time = t if isinstance(t, Tensor) else torch.full(x.shape[:2], t, dtype=x.dtype)
        slope = self.field(x, time[..., None])
        return slope if active is None else torch.where(active[..., None], slope, 0.0)


def pendulum(x: Tensor, t: Tensor) -> Tensor:
    """A nonlinear driven pendulum in the first two components; no method is exact on it."""
    return torch.stack([x[..., 1], torch.cos(3 * t[..., 0]) - torch.sin(x[..., 0])], dim=-1)


def decay(rate: Tensor) -> Field:
    """x' = -rate * (x - cos t) - sin t, solved by cos t + (x(0) - 1) exp(-rate t); a large rate is stiff."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        return -rate * (x - torch.cos(t)) - torch.sin(t)

    return field


def times(count: int, end: float = 1.0) -> list[float]:
    """`count` equidistant times from 0 to `end`."""
    return [end * i / (count - 1) for i in range(count)]


def measured_order(step: Callable[[Ode, Tensor, float, float], Tensor], counts: tuple[int, int] = (32, 64)) -> float:
    """Order of convergence of a stepping rule, from its errors on `pendulum` with two numbers of steps."""
    start = torch.tensor([[[0.4, 1.1]]], dtype=torch.float64)

    def end(steps: int) -> Tensor:
        x, grid = start, times(steps + 1)
        for t, s in pairwise(grid):
            x = step(Ode(pendulum), x, t, s)
        return x

    few, many, most = (end(n) for n in (*counts, 16 * counts[1]))
    error = [float((x - most).norm()) for x in (few, many)]
    return float(torch.tensor(error[0] / error[1]).log2())
