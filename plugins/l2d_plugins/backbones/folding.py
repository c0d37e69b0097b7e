"""Matrices made beforehand from weights of the diffusion path, to generate with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional


class Folded:
    """A matrix made of weights, for where no gradients are recorded; given up where they are, as weights then change.

    It is a copy's own, and no part of what is pickled.
    """

    def __init__(self) -> None:
        self._made: tuple[object, Tensor] | None = None
        self.sums: tuple[float, ...] = ()

    def __reduce__(self) -> tuple[type[Folded], tuple[()]]:
        return Folded, ()

    def get(self, *weights: Tensor) -> Tensor | None:
        """The matrix that was made of these weights, if they are still the same as far as can be told in no time."""
        made = self._made
        if made is None:
            return None
        if torch.is_grad_enabled():
            self._made = None
            return None
        return made[1] if torch.compiler.is_compiling() or made[0] == _state(weights) else None

    def set(self, matrix: Tensor, *weights: Tensor) -> None:
        """Keep a matrix made of these weights."""
        self._made = _state(weights), matrix

    @property
    def has(self) -> bool:
        """Whether there is a matrix."""
        return self._made is not None

    def drop(self) -> None:
        """Keep nothing."""
        self._made = None


def _state(weights: tuple[Tensor, ...]) -> object:
    return [(weight.data_ptr(), weight._version, weight.dtype) for weight in weights]


class Own(nn.Linear):
    """A projection of the path's own, which may be trained in another type than the language model's."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.folded = linear.weight, linear.bias, Folded()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        matrix = self.folded.get(self.weight)
        return functional.linear(x, self.weight if matrix is None else matrix, self.bias)

    def foldable(self, dtype: torch.dtype) -> list[Tensor]:
        """The weight to be brought to the language model's type, unless it has that."""
        return [] if self.weight.dtype == dtype else [self.weight]

    def fold(self, dtype: torch.dtype) -> None:
        """Make a copy in the language model's type."""
        self.folded.set(self.weight.to(dtype), self.weight)


@torch.no_grad()
def fold(layers: nn.Module, dtype: torch.dtype, how: Literal["auto", "always", "never"]) -> None:
    """Let projections make their matrices: if they take less than a quarter of the free memory, always, or not at all.

    Sums of what is trained tell whether it has changed since: an optimizer may change weights without a trace.
    """
    projections: list[Any] = [module for module in layers.modules() if hasattr(module, "foldable")]
    if how == "never":
        for projection in projections:
            projection.folded.drop()
        return
    sources: list[Sequence[Tensor]] = [projection.foldable(dtype) for projection in projections]
    trained = [weight.sum(dtype=torch.float64) for weights in sources for weight in weights]
    sums = iter(torch.stack(trained).tolist() if trained else [])
    stale = []
    for projection, weights in zip(projections, sources, strict=True):
        now = tuple(next(sums) for _ in weights)
        if weights and (projection.folded.sums != now or not projection.folded.has):
            projection.folded.drop()
            projection.folded.sums = now
            stale.append(projection)
    size = sum(projection.in_features * projection.out_features * dtype.itemsize for projection in stale)
    if size and (how == "always" or 4 * size <= _free_memory(next(layers.parameters()).device)):
        for projection in stale:
            projection.fold(dtype)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    # A container may have less than its machine.
    limit, used = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        free = min(free, int(most) - int(used.read_text()))
    return free
