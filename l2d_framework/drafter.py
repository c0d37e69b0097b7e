"""Drafter: a guess at the tokens to come, so that diffusion can solve several at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from l2d_framework.component import Component

if TYPE_CHECKING:  # models take seconds to import, and listing plugins needs none
    from transformers import PreTrainedModel


class Ahead(Protocol):
    """What a drafter may know of the answers, and try; B rows."""

    @property
    def tokens(self) -> Sequence[Tensor]:
        """Prompt and answer so far of each row, (S,), int64, without padding."""
        ...

    @property
    def rows(self) -> Sequence[int]:
        """A number for each row, by which one that goes on is known again; of one that has ended it may be reused."""
        ...

    def language_model(self) -> Tensor:
        """What the frozen language model says of the next token.

        Returns:
            Logits, (B, V), float32, after the tokens so far and those picked.
        """
        ...

    def pick(self, logits: Tensor) -> Tensor:
        """The next token as the answer would have it from some logits: by its processors and its random numbers.

        Args:
            logits: (B, V), float32.

        Returns:
            (B,), int64; the next pick is about the token behind it.
        """
        ...


class Drafter(Component):
    """Guesses tokens; those that diffusion would have written one by one are kept, so no answer depends on it."""

    kind: ClassVar[str] = "drafter"

    @property
    def cost(self) -> float:
        """What a guess takes, in passes of the language model; `speculate: auto` weighs it."""
        return 1.0

    def check(self, tokenizer: Any) -> None:
        """Refuse to guess for a model whose guesses could not be right, before any weights are loaded.

        Args:
            tokenizer: of the language model, a transformers tokenizer; None where there is none.

        Raises:
            ConfigError: if it does not fit.
        """

    def begin(self, lm: PreTrainedModel) -> Drafter:
        """Get ready for one request; called before its first draft.

        Args:
            lm: the frozen language model under the diffusion model.

        Returns:
            This drafter, or one that may keep what it knows of rows until the request has ended.
        """
        return self

    @abstractmethod
    def draft(self, ahead: Ahead, count: int) -> Tensor:
        """Guess the next tokens of every row.

        Args:
            ahead: the answers so far.
            count: how many tokens, 1 or more; as many may be picked.

        Returns:
            (B, n), int64, n at most `count`; none at all where there is no guess. A row with fewer guesses than others
            is filled up with any token.
        """
