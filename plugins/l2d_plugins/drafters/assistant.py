"""Guesses of a small language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor
from typing_extensions import override

from l2d_framework.drafter import Ahead, Drafter
from l2d_plugins.companions import ModelPath
from l2d_plugins.drafters.assistant_network import Reading, assistant_bytes, check_assistant, load_assistant

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Assistant(Drafter):
    """What a small language model of the same vocabulary would write, transformers' `assistant_model`.

    It computes on the device and in the type of the model that it guesses for. What it has read of a row it keeps: a
    round costs a pass of it for every guess, and each token is read once. Rows longer than it can read get no guesses.

    Source: Leviathan et al. 2023, arXiv:2211.17192.
    """

    name: Literal["assistant"] = "assistant"
    model: ModelPath
    """Folder or hub id of a causal language model with the tokenizer of the model that it guesses for, and a fraction
    of its size."""
    _reading: Reading | None = PrivateAttr(None)

    @property
    @override
    def cost(self) -> float:
        return super().cost if self._reading is None else self._reading.cost

    @override
    def check(self, tokenizer: Any) -> None:
        check_assistant(self.model, tokenizer)

    @override
    def bytes_beside(self, dtype: torch.dtype) -> int:
        return assistant_bytes(self.model, dtype)

    @override
    def begin(self, lm: PreTrainedModel) -> Assistant:
        begun = self.model_copy()
        begun._reading = Reading(load_assistant(self.model, lm.device, lm.dtype), lm)
        return begun

    @override
    def draft(self, ahead: Ahead, count: int) -> Tensor:
        assert self._reading is not None  # `begin` comes first
        reading, texts, found = self._reading, ahead.tokens, list[Tensor]()
        # The last guess is not read.
        room = [min(count, reading.room - len(text) + 1) for text in texts]
        rows = [row for row, most in enumerate(room) if most > 0]
        for number in range(max(room)):
            if number:
                read = reading.extend(found[-1][rows])
            else:
                read = reading.follow([texts[row] for row in rows], [ahead.rows[row] for row in rows])
            logits = read.new_zeros(len(texts), read.shape[1])  # rows that it cannot read are filled up with any token
            logits[rows] = read
            found.append(ahead.pick(logits))
        return torch.stack(found, 1) if found else texts[0].new_zeros(len(texts), 0)
