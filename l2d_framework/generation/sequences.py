"""Sequences as they are written: tokens picked by transformers' processors, until its criteria end a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from l2d_framework.diffusion.logits import Logits
from l2d_framework.diffusion.rng import categorical


class Sequences:
    """Prompts and answers, `ids`, (B, limit); `ends` says how many columns of each row are filled.

    Rows come differently far where tokens are guessed ahead, and where rows that have ended are replaced. Processors
    and criteria see the whole batch, since transformers makes some of them for its rows; each row is judged by the
    batch as wide as it is itself. With `own`, which makes processors for a row, each row is seen alone.
    """

    def __init__(
        self,
        ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        *,
        own: Callable[[int], LogitsProcessorList] | None = None,
    ) -> None:
        self._processors, self._criteria, self._pad = processors, criteria, _pad_token(config)
        self._own = own
        self._made: dict[int, LogitsProcessorList] = {}
        count, self.width = ids.shape
        self.limit: int = config.max_length
        self.ids = functional.pad(ids, (0, self.limit - self.width), value=self._pad)
        self.ends = [self.width] * count

    def places(self, rows: list[int], count: int) -> tuple[Tensor, Tensor]:
        """Where the next `count` tokens of some rows stand, or the last ones where it is negative: rows and columns."""
        ends = torch.tensor([self.ends[row] for row in rows], device=self.ids.device)
        columns = ends[:, None] + torch.arange(min(count, 0), max(count, 0), device=self.ids.device)
        return torch.tensor(rows, device=self.ids.device)[:, None], columns

    def forget(self, rows: list[int], count: int) -> None:
        """Take out what was written after the ends of some rows."""
        self.ids[self.places(rows, count)] = self._pad

    def pick(self, logits: Logits, rows: list[int], numbers: Tensor | None, guessed: Tensor) -> tuple[Tensor, Tensor]:
        """Write the tokens of a block as far as they are those guessed, (B', G), and the first that is another.

        They are drawn by `numbers`, (B', L), or the likeliest. Returned are which tokens of each row are written,
        (B', n), bool, n at most L, and which rows go on, (B',), bool.
        """
        goes = torch.ones(len(rows), dtype=torch.bool, device=self.ids.device)
        ended, taken = ~goes, []
        for offset, column in enumerate(logits.columns()):
            tokens, scores = self.write(column, rows, offset, None if numbers is None else numbers[:, offset], goes)
            taken.append(goes)
            stops = goes & self._stops(rows, offset, scores)
            ended, goes = ended | stops, goes & ~stops
            if offset < guessed.shape[1]:
                goes = goes & (tokens == guessed[:, offset])
                if not goes.any():
                    break
        return torch.stack(taken, 1), ~ended

    def write(
        self, logits: Tensor, rows: list[int], offset: int, numbers: Tensor | None, goes: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Write a token of each row, or of those that go on, `offset` columns after its end.

        Returned are the tokens, (B',), and all scores that processors saw, for each group of rows that end alike.
        """
        tokens, scores = torch.empty(len(rows), dtype=torch.int64, device=logits.device), []
        for members in self._groups(rows):
            there = [rows[member] for member in members]
            end = self.ends[there[0]]
            seen, places = self._seen(there, end + offset)
            whole = logits.new_zeros(len(seen), logits.shape[-1])
            whole[places] = logits[members]
            whole = self._processors_of(there)(seen, whole)  # type: ignore[arg-type]  # LongTensor
            scores.append(whole)
            if numbers is None:
                tokens[members] = whole[places].argmax(-1)
            else:
                tokens[members] = categorical(whole[places].softmax(-1), numbers[members])
            new = tokens[members]
            self.ids[there, end + offset] = new if goes is None else torch.where(goes[members], new, self._pad)
        return tokens, scores

    def _stops(self, rows: list[int], offset: int, scores: list[Tensor]) -> Tensor:
        stops = torch.zeros(len(rows), dtype=torch.bool, device=self.ids.device)
        for members, whole in zip(self._groups(rows), scores, strict=True):
            there = [rows[member] for member in members]
            seen, places = self._seen(there, self.ends[there[0]] + offset + 1)
            stops[members] = self._criteria(seen, whole)[places]
        return stops

    def _seen(self, rows: list[int], width: int) -> tuple[Tensor, list[int]]:
        """The tokens that processors and criteria are shown, (n, width), and where among them some rows stand."""
        return (self.ids[:, :width], rows) if self._own is None else (self.ids[rows, :width], [*range(len(rows))])

    def _processors_of(self, rows: list[int]) -> LogitsProcessorList:
        """Those of the batch, or of a row alone; where the batch has none, nor has a row."""
        if self._own is None or not self._processors:
            return self._processors
        (row,) = rows
        if row not in self._made:
            self._made[row] = self._own(row)
        return self._made[row]

    def _groups(self, rows: list[int]) -> list[list[int]]:
        """Numbers within `rows` of those that are seen together: those that end alike, or each alone."""
        if self._own is not None:
            return [[number] for number in range(len(rows))]
        groups: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(self.ends[row], []).append(number)
        return list(groups.values())


def _pad_token(config: GenerationConfig) -> int:
    """The pad token, or the end token where a model has none, as transformers does."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = config.eos_token_id
    return int(ends[0] if isinstance(ends, list) else ends or 0)
