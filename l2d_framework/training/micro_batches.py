"""Micro-batches: a batch a few rows at a time, as many as memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

T = TypeVar("T")


def average_gradients(parameters: Iterable[nn.Parameter], reduce: Callable[[Tensor, str], Tensor]) -> None:
    """Average gradients over processes; what has none in any of them keeps none, so that an optimizer passes over it.

    Args:
        parameters: those that are trained, in the same order in every process.
        reduce: sum or mean of a tensor over all processes.
    """
    trained = list(parameters)
    counts = reduce(torch.tensor([p.grad is not None for p in trained], device=trained[0].device).long(), "sum")
    for parameter, count in zip(trained, counts.tolist(), strict=True):
        if count:
            here = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(here, "mean")


class MicroBatches:
    """Takes steps over parts of a batch of at most `size` rows, which is halved where memory is out if it may be."""

    def __init__(self, size: int, *, halves: bool, by_length: bool) -> None:
        self.size, self.halves, self._by_length = size, halves, by_length
        self.slots = 0
        """Places, padding included, in all parts that were counted."""

    def run(
        self, batch: dict[str, Tensor], step: Callable[[dict[str, Tensor], bool], T], *, counts: bool = True
    ) -> list[T] | None:
        """What `step` makes of each part, told whether it is the last; None where memory was out: call it again."""
        parts = self._parts(batch)
        try:
            found = [step(part, part is parts[-1]) for part in parts]
        except RuntimeError as error:
            if not (self.halves and self.size > 1 and should_reduce_batch_size(error)):
                raise
        else:
            self.slots += sum(part["blocks"].numel() for part in parts) if counts else 0
            return found
        # Only here does the error hold the frames of the step, and what lies in them, no longer.
        self.size = max(min(self.size, len(batch["blocks"])) // 2, 1)
        clear_device_cache(garbage_collection=True)
        return None

    def _parts(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Parts of a batch, each as wide as its longest row; by length the longest come first, as memory is short."""
        rows = len(batch["blocks"])
        if rows <= self.size:
            return [batch]
        places = torch.arange(1, batch["blocks"].shape[1] + 1, device=batch["blocks"].device)
        ends = ((batch["blocks"] >= 0) * places).amax(1).cpu()
        order = ends.argsort(descending=True, stable=True) if self._by_length else torch.arange(rows)
        return [
            {
                name: (x if x.dim() < 2 else x[:, : int(ends[part].max())])[part.to(x.device)]
                for name, x in batch.items()
            }
            for part in order.split(self.size)
        ]
