"""Solves that choose their own steps, one evaluation after the other replayed from a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from l2d_framework.diffusion.ode import Answered, Asked, NotAhead, TokenODE
from l2d_framework.diffusion.sampler import Block, Denoised
from l2d_framework.diffusion.selection import Selection
from l2d_framework.generation.replay import Graph, Numbers, Replayed, TapedStreams, put
from l2d_framework.types import Context


class ReplayedEvaluations(Replayed):
    """Rows whose solver chooses its steps: the language model's step is replayed, and each evaluation of a solve.

    An evaluation is captured once for every power of two of rows; where the rows asked about are fewer than that, those
    of an earlier one run along. What the backbone remembers of some rows is copied when others are asked about.
    """

    @override
    def _begin(self, context: Context) -> None:
        super()._begin(context)
        self._is_tried = False
        self._parts: dict[int, _Part] = {}
        self._evaluations: dict[Any, _Evaluation] = {}

    @property
    def count(self) -> int:
        """Rows there is room for."""
        assert self._tokens is not None
        return len(self._tokens)

    @override
    def _replay(self, tokens: Tensor, block: Block) -> Denoised:
        if self._tokens is None:
            self._tokens = tokens.clone()
        put(self._tokens, tokens, self._alive)
        self.context = self._captured(self._graph, self._extend)
        for part in self._parts.values():
            part.is_stale = True
        found = self.sampler.solve(block, partial(_ReplayedODE, rows=self))
        self._is_tried = True
        if self._graph is None:
            self._stop()
        return found

    def _extend(self) -> Context:
        assert self._tokens is not None
        extended: Context = self.backbone.extend(self.context, self._tokens)
        return extended

    def evaluate(self, answer: Callable[[Asked, Selection], Answered], asked: Asked, random: Selection) -> Answered:
        """An evaluation of some rows of a block.

        Args:
            answer: makes it.
            asked: what it depends on; the context is ignored.
            random: its random numbers.

        Returns:
            What `answer` makes.
        """
        every = torch.arange(self.count, device=asked.query.t.device) if self._alive is None else self._alive
        slots = random.rows(every)
        size = min(1 << (len(slots) - 1).bit_length(), self.count)
        is_whole = size == self.count
        rows = slots if is_whole else torch.arange(len(slots), device=slots.device)
        context = self.context if is_whole else self._part(size, slots)
        kinds = (None if value is None else (value.shape[1:], value.dtype) for value in asked.by_row)
        key = size, asked.query.shared_time, *kinds
        evaluation = self._evaluations.get(key)
        graph = None if evaluation is None else evaluation.graph
        if evaluation is None:
            evaluation = self._evaluations[key] = _Evaluation(asked, random, rows, size, self.new_graph())
        else:
            evaluation.fill(asked, random, rows)
        found: Answered = self._captured(graph, lambda: evaluation.answer(answer, context))
        return found.select(rows)

    @override
    def _captured(self, graph: Graph | None, work: Callable[[], Any]) -> Any:
        # Nothing of the first token, so that all is captured with tensors that stay where they are.
        return super()._captured(graph if self._is_tried else None, work)

    @override
    def _stop(self) -> None:
        super()._stop()
        self._parts, self._evaluations = {}, {}

    def _part(self, size: int, slots: Tensor) -> Any:
        """What the backbone remembers of the rows in some slots, and of any others behind them."""
        part = self._parts.get(size)
        if part is None:
            part = self._parts[size] = _Part(slots[:1].expand(size).clone(), self.new_graph())
        if part.is_stale or not torch.equal(part.slots[: len(slots)], slots):
            part.slots[: len(slots)] = slots
            part.context = self._captured(part.graph, lambda: self.context.select(part.slots))
            part.is_stale = False
        return part.context


@dataclass
class _Part:
    """What the backbone remembers of some rows, where it stays."""

    slots: Tensor  # of the rows in the whole, (size,)
    graph: Graph
    is_stale: bool = True
    context: Any = None


class _Evaluation:
    """An evaluation of so many rows, with everything it depends on in tensors that stay where they are."""

    def __init__(self, asked: Asked, random: Selection, rows: Tensor, size: int, graph: Graph) -> None:
        def room(values: Tensor) -> Tensor:
            # Rows that nobody asks about need numbers that make sense.
            whole = values[:1].expand(size, *values.shape[1:]).clone()
            whole[rows] = values
            return whole

        nothing: Any = None
        self.graph = graph
        self._asked = asked.with_rows([None if value is None else room(value) for value in asked.by_row], nothing)
        self._numbers = Numbers(room)
        self._random = Selection(TapedStreams(self._numbers, "estimate", 0, random))

    def fill(self, asked: Asked, random: Selection, rows: Tensor) -> None:
        """Put in what some rows are asked about now."""
        for old, new in zip(self._asked.by_row, asked.by_row, strict=True):
            if old is not None and new is not None:
                put(old, new, rows)
        self._numbers.fill(lambda _: random, rows)

    def answer(self, answer: Callable[[Asked, Selection], Answered], context: Context) -> Answered:
        """Evaluate."""
        self._numbers.rewind()
        return answer(self._asked.with_rows(self._asked.by_row, context), self._random)


class _ReplayedODE(TokenODE):
    """The equation of rows whose evaluations are replayed."""

    def __init__(self, *args: Any, rows: ReplayedEvaluations, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self._query.x) is not Tensor:  # a state that keeps tokens and seeds
            raise NotAhead
        self._replayed = rows
        self._token_count = rows.count

    @override
    def _asked(self, active: Tensor) -> tuple[Tensor, Context]:
        return active.any(1).nonzero()[:, 0], self._query.context

    @override
    def _answer(self, asked: Asked, random: Selection) -> Answered:
        return self._replayed.evaluate(super()._answer, asked, random)
