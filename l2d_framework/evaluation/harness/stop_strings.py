"""Stop strings as lm_eval means them: in the answer only, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class Until(StoppingCriteria):
    """Ends a row once its answer contains a string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], start: int) -> None:
        self._tokenizer, self._strings, self._start = tokenizer, [s for s in strings if s], start
        # A token has at least one byte; one more, because decoders drop a leading space.
        self._window = 1 + max((len(s.encode()) for s in self._strings), default=0)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows are done, (B,), bool."""
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._window) :].tolist()
        texts = [str(self._tokenizer.decode(tail)) for tail in tails]
        done = [any(string in text for string in self._strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)
