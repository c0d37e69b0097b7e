"""Matrices made beforehand from weights of the diffusion path, to generate with."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional


class Folded:
    """A matrix made of weights, for where no gradients are recorded; forgotten as soon as one of them has changed."""

    def __init__(self) -> None:
        self._made: tuple[object, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Folded:
        return Folded()

    def get(self, *weights: Tensor) -> Tensor | None:
        """The matrix that was made of these weights."""
        made = self._made
        if made is None or torch.is_grad_enabled():
            return None
        return made[1] if torch.compiler.is_compiling() or made[0] == _state(weights) else None

    def set(self, matrix: Tensor, *weights: Tensor) -> None:
        """Keep a matrix made of these weights."""
        self._made = _state(weights), matrix


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

    def fold(self, dtype: torch.dtype, *, dry: bool = False) -> int:
        """Make a copy in the language model's type, unless it has that, and say how many bytes it takes."""
        if self.weight.dtype == dtype or self.folded.get(self.weight) is not None:
            return 0
        if not dry:
            self.folded.set(self.weight.to(dtype), self.weight)
        return self.weight.numel() * dtype.itemsize


@torch.no_grad()
def fold(layers: nn.Module, dtype: torch.dtype, *, at_any_cost: bool) -> None:
    """Let projections make their matrices, if they take less than half of the free memory."""
    projections: list[Any] = [module for module in layers.modules() if hasattr(module, "fold")]
    size = sum(projection.fold(dtype, dry=True) for projection in projections)
    if size and (at_any_cost or 2 * size <= _free_memory(next(layers.parameters()).device)):
        for projection in projections:
            projection.fold(dtype)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
