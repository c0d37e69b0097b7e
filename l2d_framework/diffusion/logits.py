"""What the network answers about a block: logits, whole or made from hidden states a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from l2d_framework.simplex_state import pieces


@dataclass(frozen=True)
class Logits:
    """Logits about the positions of a block.

    Attributes:
        values: logits, (B, L, V), or the hidden states they are made from, (B, L, H).
        vocab_size: V.
        head: makes logits (B, n, V) from hidden states (B, n, H); None when `values` are logits.
    """

    values: Tensor
    vocab_size: int
    head: Callable[[Tensor], Tensor] | None = None

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Logits a few positions at a time.

        Yields:
            The positions as a slice, and their logits, (B, n, V), float32.
        """
        rows, length = self.values.shape[:2]
        for part in pieces(rows, length, self.vocab_size):
            values = self.values[:, part]
            yield part, values if self.head is None else self.head(values).float()

    def columns(self) -> Iterator[Tensor]:
        """Logits position by position.

        Yields:
            (B, V), float32.
        """
        for _, logits in self.parts():
            yield from logits.unbind(1)

    def where(self, chosen: Tensor, other: Logits) -> Logits:
        """This answer in some rows, another one elsewhere.

        Args:
            chosen: rows to take from this answer, (B,), bool.
            other: an answer of the same kind.

        Returns:
            The mixed answer.
        """
        return Logits(torch.where(chosen[:, None, None], self.values, other.values), self.vocab_size, self.head)
