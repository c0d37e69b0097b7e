"""What generation returns: answers as tokens and as texts, and how they show themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from l2d_framework.errors import ConfigError

_FEW, _ROWS = 3, 10
"""Answers that a repr shows, and a notebook."""
_LINE, _CELL = 60, 500
"""Characters of each that a repr shows, and a notebook."""
_TOKENS = 256
"""Tokens of each that are made into text to be shown."""


@dataclass(frozen=True, repr=False)
class Generation:
    """What `generate` returns.

    Attributes:
        sequences: prompts and answers, (B * samples, S + N), int64, padded on the right after the end of an answer.
        evaluations: evaluations spent on each answer token (a guidance may call the network more than once
            in each), (B * samples, N), int64; 0 on padding.
        lengths: tokens of each answer, its end token included, (B * samples,), int64.
        prompt_length: S.
        metrics: what guidance recorded at each evaluation, by name, (B * samples, evaluations), float32, NaN where a
            row took no part; such as the reward of each step.
        guesses: tokens guessed ahead whose rightness was found out, and how many were right.
        tokenizer: the model's, if it has one.
    """

    sequences: Tensor
    evaluations: Tensor
    lengths: Tensor
    prompt_length: int
    metrics: dict[str, Tensor] = field(default_factory=dict)
    guesses: tuple[int, int] = (0, 0)
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def answers(self) -> Tensor:
        """Answer tokens alone, (B * samples, N), int64."""
        return self.sequences[:, self.prompt_length :]

    def texts(self, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Answers as texts, without their prompts and without special tokens such as the one that ends an answer.

        Args:
            tokenizer: the model's own when None.

        Returns:
            A text per answer, (B * samples) of them; several answers to a prompt stand next to each other.

        Raises:
            ConfigError: if there is no tokenizer.
        """
        return [*_texts(self._rows(), tokenizer or self.tokenizer)]

    def _rows(self, count: int | None = None) -> list[list[int]]:
        """Tokens of the first answers."""
        rows = zip(self.answers[:count].tolist(), self.lengths[:count].tolist(), strict=True)
        return [tokens[:length] for tokens, length in rows]

    def _facts(self) -> str:
        count, tokens = len(self.lengths), int(self.lengths.sum())
        spent = f"{int(self.evaluations.sum()) / max(tokens, 1):.3g}"
        return f"{_counted(count, 'answer')}, {_counted(tokens, 'token')}, {spent} evaluations per token"

    def __repr__(self) -> str:
        return _line(self, self._facts(), len(self.lengths), self._rows(_FEW), self.tokenizer)

    def _repr_html_(self) -> str:
        rows = self._rows(_ROWS)
        costs = zip(self.lengths[:_ROWS].tolist(), self.evaluations[:_ROWS].sum(1).tolist(), strict=True)
        columns = {"answer": _previews(rows, self.tokenizer, _CELL)} if self.tokenizer else {}
        columns |= {"tokens": [], "evaluations per token": []}
        for length, spent in costs:
            columns["tokens"].append(f"{length:,}")
            columns["evaluations per token"].append(f"{spent / max(length, 1):.3g}")
        return html_table(f"Generation: {self._facts()}", columns, left_out=len(self.lengths) - len(rows))


@dataclass(frozen=True, repr=False)
class Infilled:
    """What `infill` returns.

    Attributes:
        sequences: texts with their gaps filled, padded on the left, (B, S), int64.
        blocks: as given, (B, S), int64.
        evaluations: network evaluations spent on each row, (B,), int64.
        metrics: what guidance recorded, by name, (B, evaluations), float32.
        tokenizer: the model's, if it has one.
    """

    sequences: Tensor
    blocks: Tensor
    evaluations: Tensor
    metrics: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase | None = None

    def texts(self, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """The filled texts, without special tokens.

        Args:
            tokenizer: the model's own when None.

        Returns:
            A text per row, (B,) of them.

        Raises:
            ConfigError: if there is no tokenizer.
        """
        return [*_texts(self._rows(), tokenizer or self.tokenizer)]

    def _rows(self, count: int | None = None) -> list[list[int]]:
        rows = zip(self.sequences[:count], self.blocks[:count], strict=True)
        return [row[here >= 0].tolist() for row, here in rows]

    def ended(self, ends: Sequence[int]) -> Infilled:
        """A copy in which a token that ends an answer stands in the rest of its gap, too."""
        tokens = self.sequences.clone()
        for place in range(1, tokens.shape[1]):
            before = tokens[:, place - 1]
            stops = (self.blocks[:, place - 1 : place + 1] >= 1).all(1) & torch.isin(before, before.new_tensor(ends))
            tokens[:, place] = torch.where(stops, before, tokens[:, place])
        return replace(self, sequences=tokens)

    def _facts(self) -> str:
        filled = _counted(int((self.blocks >= 1).sum()), "token")
        return f"{_counted(len(self.sequences), 'text')}, {filled} filled in"

    def __repr__(self) -> str:
        return _line(self, self._facts(), len(self.sequences), self._rows(_FEW), self.tokenizer)

    def _repr_html_(self) -> str:
        rows = self._rows(_ROWS)
        columns = {"text": _previews(rows, self.tokenizer, _CELL)} if self.tokenizer else {}
        columns["tokens filled in"] = [f"{int((here >= 1).sum()):,}" for here in self.blocks[:_ROWS]]
        columns["evaluations"] = [f"{spent:,}" for spent in self.evaluations[:_ROWS].tolist()]
        return html_table(f"Infilled: {self._facts()}", columns, left_out=len(self.sequences) - len(rows))


def html_table(title: str, columns: Mapping[str, Sequence[str]], *, left_out: int = 0) -> str:
    """A small table for a notebook, everything in it escaped; `left_out`: rows that it lacks."""
    style = "text-align:left;vertical-align:top;white-space:pre-wrap"
    heading = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{style}">{escape(cell)}</td>' for cell in row) + "</tr>"
        for row in zip(*columns.values(), strict=True)
    )
    more = f"<p>and {left_out:,} more</p>" if left_out else ""
    return (
        f"<div><p><b>{escape(title)}</b></p><table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>"
        f"{more}</div>"
    )


def _texts(rows: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase | None) -> Iterable[str]:
    if tokenizer is None:
        raise ConfigError("There is no tokenizer to make texts of tokens. Pass one: texts(tokenizer).")
    return (str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows)


def _line(
    result: Any, facts: str, count: int, rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase | None
) -> str:
    shown = [*map(repr, _previews(rows, tokenizer, _LINE))] if tokenizer else []
    more = [f"and {count - len(shown):,} more"] if 0 < len(shown) < count else []
    return f"{type(result).__name__}({facts}{': ' if shown else ''}{', '.join(shown + more)})"


def _previews(rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase | None, length: int) -> list[str]:
    """The beginnings of texts."""
    texts = _texts((row[:_TOKENS] for row in rows), tokenizer)
    return [
        f"{text[: length - 1]}…" if len(text) > length or len(row) > _TOKENS else text
        for text, row in zip(texts, rows, strict=True)
    ]


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
