"""Laws of drafters; that no answer depends on one is the loop's affair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2d_framework.drafter import Drafter
from l2d_framework.testing.laws import Laws, ensure
from l2d_framework.testing.scenes import tiny_llama

law = Laws(torch.no_grad())

_VOCAB = 11
_TEXTS = ([3, 4, 5, 6, 3, 4], [7, 8, 9], [2], [5, 5, 5, 5])


@law
def check_drafter_guesses_tokens(drafter: Drafter) -> None:
    """A draft is of at most as many tokens as are wanted, int64 and of the vocabulary, for every row."""
    for count in (1, 3, 20):
        found: Any = _draft(_begun(drafter), _TEXTS, count)
        ensure(isinstance(found, Tensor) and found.dtype == torch.int64, f"A draft is int64, got {found!r:.80}.")
        is_shaped = found.ndim == 2 and len(found) == len(_TEXTS) and found.shape[1] <= count
        ensure(is_shaped, f"Of {len(_TEXTS)} rows at most {count} tokens are wanted, got {tuple(found.shape)}.")
        ensure(((found >= 0) & (found < _VOCAB)).all(), f"{found.tolist()} are not all among {_VOCAB} tokens.")


@law
def check_drafter_is_rowwise(drafter: Drafter) -> None:
    """A row gets the guesses that it gets alone, and perhaps some to fill it up."""
    together = _draft(_begun(drafter), _TEXTS, 3)
    for row, text in enumerate(_TEXTS):
        (alone,) = _draft(_begun(drafter), [text], 3).tolist()
        beside = together[row, : len(alone)].tolist()
        ensure(alone == beside, f"Guesses of a row must not depend on others: {alone} alone, {beside} beside them.")


@law
def check_drafter_remembers_what_is_so(drafter: Drafter) -> None:
    """Guesses are those of a drafter that has just begun, however rows go on, end, move and make room for others."""
    begun, rows = _begun(drafter), dict(enumerate(_TEXTS))
    for number in range(4):
        found = _draft(begun, [*rows.values()], 3, [*rows])
        anew = _draft(_begun(drafter), [*rows.values()], 3, [*rows])
        ensure(
            torch.equal(found, anew),
            f"In round {number} rows {rows} got {found.tolist()}, and {anew.tolist()} from a drafter that had read "
            "nothing. Nothing may be left of guesses that were wrong, nor of rows that have ended.",
        )
        # Of each row another number of guesses was right; all of them are followed by a token that nobody guessed.
        grown = {row: [*text, *found[n, : n % 4].tolist(), 9] for n, (row, text) in enumerate(rows.items())}
        first, *rest = grown
        rows = {row: grown[row] for row in rest} | {first: [1, number], 4 + number: [*grown[first], 2]}


class _Ahead:
    """Texts whose next token follows from the last one, and of which so many may be picked as are wanted."""

    def __init__(self, texts: list[list[int]], count: int, rows: list[int]) -> None:
        self.rows = rows
        self.tokens = [torch.tensor(text) for text in texts]
        self._last, self._left = torch.stack([text[-1] for text in self.tokens]), count

    def language_model(self) -> Tensor:
        return torch.nn.functional.one_hot((self._last * 7 + 3) % _VOCAB, _VOCAB).float()

    def pick(self, logits: Tensor) -> Tensor:
        ensure(self._left > 0, "More tokens were picked than are wanted.")
        self._left -= 1
        self._last = logits.argmax(-1)
        return self._last


def _begun(drafter: Drafter) -> Drafter:
    return drafter.begin(tiny_llama(vocab_size=_VOCAB))


def _draft(
    drafter: Drafter, texts: tuple[list[int], ...] | list[list[int]], count: int, rows: list[int] | None = None
) -> Tensor:
    return drafter.draft(_Ahead(list(texts), count, rows or [*range(len(texts))]), count)
