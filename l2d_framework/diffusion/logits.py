"""Logits about a block, whole or made from hidden states a few positions at a time, and how many that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**24
"""Largest number of entries of a tensor as wide as the vocabulary that is made in one piece."""

_CACHED = 2**17
"""Number of entries that several passes in a row find in the cache of a CPU."""


def pieces(rows: int, length: int, width: int, limit: int | None = None) -> Iterator[slice]:
    """Slices of positions, in order, of at most `limit` entries (`CHUNK` when None) if a single position allows it."""
    step = max(1, (CHUNK if limit is None else limit) // max(rows * width, 1))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def dense(state: Tensor) -> Tensor:
    """A state with all its numbers, (B, L, D), which a space may keep as less: as tokens and seeds, say."""
    return state.dense() if hasattr(state, "dense") else state


def cached_pieces(values: Tensor) -> Iterator[slice]:
    """Slices of L that several operations in a row should visit one by one: as small as a cache on a CPU."""
    rows, length, width = values.shape
    return pieces(rows, length, width, limit=min(_CACHED, CHUNK) if values.device.type == "cpu" else None)


@dataclass(frozen=True)
class Logits:
    """Logits about the positions of a block."""

    values: Tensor  # (B, L, V), or the hidden states that `head` makes them from, (B, L, H)
    vocab_size: int
    head: Callable[[Tensor], Tensor] | None = None

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Logits a few positions at a time, (B, n, V), float32, with the slice of the positions."""
        rows, length = self.values.shape[:2]
        for part in pieces(rows, length, self.vocab_size):
            values = self.values[:, part]
            yield part, values if self.head is None else self.head(values).float()

    def columns(self) -> Iterator[Tensor]:
        """Logits position by position, (B, V), float32."""
        for _, logits in self.parts():
            yield from logits.unbind(1)

    def where(self, chosen: Tensor, other: Logits) -> Logits:
        """These in the `chosen` rows, (B,), bool, others of the same kind elsewhere."""
        return Logits(torch.where(chosen[:, None, None], self.values, other.values), self.vocab_size, self.head)
