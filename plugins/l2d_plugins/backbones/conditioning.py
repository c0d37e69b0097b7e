"""Time and class conditioning of the diffusion path: a DiT-style modulation per layer and the final weight w(t)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, size: int) -> Tensor:
    """Fourier features of time, (..., size), cosines first; t stays in [0, 1] and is not multiplied by 1000.

    Source: Peebles & Xie 2023, arXiv:2212.09748, frequencies exp(-ln(10000) i / (size / 2)).
    """
    half = size // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def _mlp(size: int, out: int) -> nn.Sequential:
    """Two layers, the last one zero, so that a fresh diffusion path changes nothing."""
    first, last = nn.Linear(size, size), nn.Linear(size, out)
    nn.init.xavier_uniform_(first.weight)
    for zero in (first.bias, last.weight, last.bias):
        nn.init.zeros_(zero)
    return nn.Sequential(first, nn.SiLU(), last)


Modulation = tuple[list[Tensor], Tensor]
"""Per layer (..., chunks * H), and the final weight (..., H)."""

Modulations = tuple[list[Callable[[], Tensor]], Tensor]
"""The same with the layers' still to be made, since all of them together take more memory than the layers' states."""


class Conditioning(nn.Module):
    """Modulation vectors as a function of time and class.

    Args:
        sizes: (time features, conditioning width C).
        hidden_size: H.
        chunks: modulation vectors each layer takes.
        num_classes: J; the table has J + 1 rows, the last for no class, and is absent when J is 0.
    """

    def __init__(self, sizes: tuple[int, int], hidden_size: int, chunks: list[int], num_classes: int) -> None:
        super().__init__()
        self.features, width = sizes
        self.num_classes = num_classes
        first, last = nn.Linear(self.features, width), nn.Linear(width, width)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.time = nn.Sequential(first, nn.SiLU(), last)
        if num_classes:
            self.classes = nn.Embedding(num_classes + 1, width)
            nn.init.normal_(self.classes.weight, std=0.02)
        self.layers = nn.ModuleList(_mlp(width, count * hidden_size) for count in chunks)
        self.final = _mlp(width, hidden_size)

    def biases(self) -> list[Tensor]:
        """Per layer the modulation of a fresh path, (chunks * H), the same at all times."""
        return [head[-1].bias for head in self.layers]  # type: ignore[index]

    def forward(self, t: Tensor, condition: Tensor | None) -> Modulations:
        """Modulation at every position, (B, L, chunks * H) per layer, and w(t) - w(0), (B, L, H); class -1 is none."""
        return self._at(t, self._rows(condition, t.shape))

    def _rows(self, condition: Tensor | None, shape: torch.Size) -> Tensor | None:
        if not self.num_classes:
            return None
        if condition is None:
            condition = torch.full(shape, -1, device=self.classes.weight.device)
        return torch.where(condition < 0, self.num_classes, condition)

    def _at(self, t: Tensor, rows: Tensor | None) -> Modulations:
        embedding = self._embed(t, rows)
        # w(0) depends on the class only, so it is computed once per class and looked up.
        start = torch.zeros(self.num_classes + 1, device=t.device)
        at_zero = self.final(self._embed(start, torch.arange(len(start), device=t.device)))
        at_zero = at_zero[0] if rows is None else at_zero[rows]
        return [partial(head, embedding) for head in self.layers], self.final(embedding) - at_zero

    def _embed(self, t: Tensor, rows: Tensor | None) -> Tensor:
        embedding: Tensor = self.time(sinusoid(t, self.features).to(next(self.time.parameters()).dtype))
        if self.num_classes and rows is not None:
            embedding = embedding + self.classes(rows)
        return embedding

    def table(self, t: float) -> Modulation:
        """Modulation of every class at one time: (J + 1, chunks * H) per layer, and (J + 1, H)."""
        device = next(self.time.parameters()).device
        count = self.num_classes + 1
        times = torch.full((count,), t, device=device)
        layers, weight = self._at(times, torch.arange(count, device=device) if self.num_classes else None)
        return [make() for make in layers], weight

    def look_up(self, table: Modulation, condition: Tensor | None) -> Modulation:
        """Rows of a table for every position; without B and L if `condition` is None."""
        layers, weight = table
        if condition is None:
            return [part[-1] for part in layers], weight[-1]
        rows = torch.where(condition < 0, self.num_classes, condition)
        return [part[rows] for part in layers], weight[rows]
