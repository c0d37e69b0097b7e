"""Early stop: rows whose tokens have stopped changing."""

from __future__ import annotations

import torch
from torch import Tensor

from l2d_framework.diffusion.logits import Logits


class Settled(Exception):
    """Every row of a block has settled, with these logits, so the solver may stop."""

    def __init__(self, logits: Logits) -> None:
        super().__init__()
        self.logits = logits


class EarlyStop:
    """Rows whose tokens no longer change keep the logits they had then, whatever their batch mates still do.

    A row has settled after `patience` evaluations without a change; `going` are the others, (B,), bool, on the host.
    """

    def __init__(self, patience: int, rows: int) -> None:
        self._patience = patience
        self._tokens: Tensor | None = None
        self._kept: Logits | None = None
        self._unchanged = torch.zeros(rows, dtype=torch.int64)
        self.going = torch.ones(rows, dtype=torch.bool)

    def add(self, logits: Logits, tokens: Tensor, *, is_last: bool) -> Logits:
        """The logits of an evaluation, with those of settled rows in their place; Settled before the read-out."""
        if self._tokens is not None:
            same = (tokens == self._tokens).all(1).cpu()
            self._unchanged = torch.where(same, self._unchanged + 1, 0)
        self._tokens = tokens
        self._kept = logits if self._kept is None else logits.where(self.going.to(tokens.device), self._kept)
        self.going = self.going & (self._unchanged < self._patience)
        if not is_last and not self.going.any():
            raise Settled(self._kept)
        return self._kept
