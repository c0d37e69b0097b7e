"""Early stop: rows whose tokens have stopped changing."""

from __future__ import annotations

from dataclasses import replace

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
        """The logits, with those of rows settled before, which they may lack, put in; Settled before the read-out."""
        if self._tokens is not None and self._kept is not None:
            if not self.going.all():
                rows = self.going.nonzero()[:, 0].to(tokens.device)
                tokens = _put(self._tokens, rows, tokens)
                logits = replace(logits, values=_put(self._kept.values, rows, logits.values))
            same = (tokens == self._tokens).all(1).cpu()
            self._unchanged = torch.where(same, self._unchanged + 1, 0)
        self._tokens, self._kept = tokens, logits
        self.going = self.going & (self._unchanged < self._patience)
        if not is_last and not self.going.any():
            raise Settled(logits)
        return logits


def _put(kept: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    return kept.index_copy(0, rows, values if len(values) == len(rows) else values[rows])
