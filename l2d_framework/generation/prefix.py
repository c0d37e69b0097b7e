"""What several prompts begin with, such as the examples of a task: read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from l2d_framework.backbone import Backbone
from l2d_framework.types import Layout

SHARED = 32
"""Fewest tokens that are worth being read apart, where all prompts begin with them."""


class Prefix:
    """Tokens that prompts begin with.

    Args:
        backbone: reads them; it declares `rewinds`.
        tokens: token ids.
    """

    def __init__(self, backbone: Backbone, tokens: Sequence[int]) -> None:
        self.backbone, self.tokens = backbone, list(tokens)

    @classmethod
    def of(cls, backbone: Backbone, prompts: Sequence[Sequence[int]]) -> Prefix | None:
        """What all prompts begin with, without their last token; None where reading it once saves little."""
        if not backbone.rewinds or len(prompts) == 1:
            return None
        low, high = min(map(list, prompts)), max(map(list, prompts))
        shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(low[:-1], high[:-1], strict=False))]
        rest = sum(map(len, prompts)) - len(shared) * len(prompts)
        saves = len(shared) >= SHARED and len(shared) > rest / len(prompts) / 4
        return cls(backbone, shared) if saves else None

    @cached_property
    def _context(self) -> Any:
        known = self._tensor([self.tokens])
        return self.backbone.read(Layout(known, torch.zeros_like(known)))

    def begins(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt begins with these tokens and has more."""
        count = len(self.tokens)
        return len(prompt) > count and list(prompt[:count]) == self.tokens

    def forget(self) -> None:
        """Keep nothing of what was read."""
        self.__dict__.pop("_context", None)

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, int]:
        """All but the last tokens of prompts that begin so, to be extended before anything is asked, and its slots."""
        rests = [torch.tensor(prompt[len(self.tokens) : -1], dtype=torch.int64) for prompt in prompts]
        rest = pad_sequence(rests, batch_first=True)
        context = self._context.select(self._tensor([0] * len(prompts)))
        if rest.shape[1]:
            context = self.backbone.extend(context, rest.to(self.backbone.lm.device))
        missing = [rest.shape[1] - len(tokens) for tokens in rests]
        if any(missing):
            context = self.backbone.rewind(context, self._tensor(missing))
        return context, len(self.tokens) + rest.shape[1] - min(missing)

    def _tensor(self, numbers: list[Any]) -> Tensor:
        return torch.tensor(numbers, device=self.backbone.lm.device)
