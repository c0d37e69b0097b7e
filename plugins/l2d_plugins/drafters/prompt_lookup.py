"""Guesses looked up in the text itself."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from typing_extensions import override

from l2d_framework.drafter import Ahead, Drafter


class PromptLookup(Drafter):
    """What stood behind the last tokens where prompt or answer had them before; for answers that copy or repeat.

    Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding, as transformers has it.
    """

    cost: ClassVar[float] = 0.0

    name: Literal["prompt_lookup"] = "prompt_lookup"
    max_matching_ngram_size: int = Field(default=2, ge=1)
    """Last tokens to look for; where so many are not found, one fewer, down to a single one."""

    @override
    def draft(self, ahead: Ahead, count: int) -> Tensor:
        return pad_sequence([self._found(tokens, count) for tokens in ahead.tokens], batch_first=True)

    def _found(self, tokens: Tensor, count: int) -> Tensor:
        search = PromptLookupCandidateGenerator(
            num_output_tokens=count,
            max_matching_ngram_size=self.max_matching_ngram_size,
            max_length=len(tokens) + count + 1,
        )
        longer, _ = search.get_candidates(tokens[None])  # type: ignore[arg-type]  # LongTensor
        return longer[0, len(tokens) :]
