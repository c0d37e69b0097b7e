"""Sequences as they are written: tokens picked by transformers' processors, until its criteria end a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from l2d_framework.diffusion.logits import Logits
from l2d_framework.diffusion.rng import categorical


class Sequences:
    """Prompts and answers, `ids`, (B, limit); `ends` says how many columns of each row are filled.

    Rows come differently far where tokens are guessed ahead. Processors and criteria always see the whole batch, since
    transformers makes some of them for its rows; each row is judged by the batch as wide as it is itself.
    """

    def __init__(
        self, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        self._processors, self._criteria, self._pad = processors, criteria, _pad_token(config)
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

        Returned are the tokens, (B',), and the scores of the whole batch, for each group of rows that end alike.
        """
        tokens, scores = torch.empty(len(rows), dtype=torch.int64, device=logits.device), []
        for end, members in self._groups(rows).items():
            there = [rows[member] for member in members]
            whole = logits.new_zeros(len(self.ids), logits.shape[-1])
            whole[there] = logits[members]
            whole = self._processors(self.ids[:, : end + offset], whole)  # type: ignore[arg-type]  # LongTensor
            scores.append(whole)
            if numbers is None:
                tokens[members] = whole[there].argmax(-1)
            else:
                tokens[members] = categorical(whole[there].softmax(-1), numbers[members])
            new = tokens[members]
            self.ids[there, end + offset] = new if goes is None else torch.where(goes[members], new, self._pad)
        return tokens, scores

    def _stops(self, rows: list[int], offset: int, scores: list[Tensor]) -> Tensor:
        stops = torch.zeros(len(rows), dtype=torch.bool, device=self.ids.device)
        for (end, members), whole in zip(self._groups(rows).items(), scores, strict=True):
            there = [rows[member] for member in members]
            stops[members] = self._criteria(self.ids[:, : end + offset + 1], whole)[there]
        return stops

    def _groups(self, rows: list[int]) -> dict[int, list[int]]:
        """Numbers within `rows` by where the row ends."""
        groups: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(self.ends[row], []).append(number)
        return groups


def _pad_token(config: GenerationConfig) -> int:
    """The pad token, or the end token where a model has none, as transformers does."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = config.eos_token_id
    return int(ends[0] if isinstance(ends, list) else ends or 0)
