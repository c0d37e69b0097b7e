"""The tokens of a block that a solver asks about, and their random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.types import Context, Query, Random


class Subset:
    """The active tokens of a block as a smaller block: rows with any, and in each the active positions first.

    Args:
        rows: numbers of the rows with active tokens, (B',), int64.
        active: (B, L), bool.
        context: of those rows.
    """

    def __init__(self, rows: Tensor, active: Tensor, context: Context) -> None:
        width = int(active.sum(1).max())
        order = (~active[rows]).long().argsort(stable=True, dim=1)[:, :width]
        self.rows, self.columns, self.active, self.context = rows[:, None], order, active, context

    def take(self, values: Tensor) -> Tensor:
        """Values of the smaller block.

        Args:
            values: (B, L, ...).

        Returns:
            (B', L', ...).
        """
        return values[self.rows, self.columns]

    def put(self, values: Tensor) -> Tensor:
        """Values at the active tokens, zero elsewhere.

        Args:
            values: of the smaller block, (B', L', ...).

        Returns:
            (B, L, ...).
        """
        out = values.new_zeros(*self.active.shape, *values.shape[2:])
        out[self.rows, self.columns] = values
        return torch.where(self.active[..., None], out, 0)

    def query(self, query: Query) -> Query:
        """A query about the smaller block.

        Args:
            query: about the whole.

        Returns:
            About the active tokens.
        """
        optional = {"condition": query.condition, "previous": query.previous, "guidance_scale": query.guidance_scale}
        taken: dict[str, Any] = {name: self.take(value) for name, value in optional.items() if value is not None}
        return replace(
            query,
            x=self.take(query.x),
            t=self.take(query.t),
            positions=self.take(query.positions),
            context=self.context,
            **taken,
        )


class AllTokens:
    """Random numbers for all tokens of the block.

    Args:
        streams: of the block.
    """

    def __init__(self, streams: TokenStreams) -> None:
        self._streams = streams

    @property
    def device(self) -> torch.device:
        """Where the numbers are wanted."""
        return self._streams.device

    def uniform(self) -> Tensor:
        """Next number of every stream, (B', L')."""
        return self._streams.uniform()

    def normal(self, size: int) -> Tensor:
        """Next normal numbers of every stream.

        Args:
            size: how many per token.

        Returns:
            (B', L', size).
        """
        return self._streams.normal(size)

    def seeds(self) -> Tensor:
        """Next seed of every stream, (B', L'), on the host."""
        return self._streams.seeds()

    def branch(self, number: int) -> AllTokens:
        """Independent streams of the same tokens.

        Args:
            number: which; 0 for these.

        Returns:
            The streams.
        """
        return AllTokens(self._streams.branch(number))

    def count(self, evaluations: Tensor, going: Tensor | None) -> None:
        """Count one evaluation.

        Args:
            evaluations: per token, (B, L), int64; changed in place.
            going: rows that have not settled, (B,), bool, or None for all.
        """
        evaluations += 1 if going is None else going[:, None].to(evaluations)

    def keep(self, memory: Tensor, earlier: Tensor | None) -> Tensor:
        """What is remembered of the evaluations so far.

        Args:
            memory: of this one.
            earlier: of those before, (B, L, M), or None.

        Returns:
            (B, L, M).
        """
        return memory

    def rows(self, values: Tensor) -> Tensor:
        """Values of the rows asked about.

        Args:
            values: (B, ...).

        Returns:
            (B', ...).
        """
        return values

    def spread(self, values: Tensor) -> Tensor:
        """Values for all rows, NaN where nothing was asked.

        Args:
            values: (B',), float.

        Returns:
            (B,), float32.
        """
        return values


class ActiveTokens:
    """Random numbers for the active tokens; of the streams of `uniform`, only theirs advance.

    Args:
        streams: of the block.
        part: the active tokens.
    """

    def __init__(self, streams: TokenStreams, part: Subset) -> None:
        self._streams, self._part = streams, part

    @property
    def device(self) -> torch.device:
        """Where the numbers are wanted."""
        return self._streams.device

    def uniform(self) -> Tensor:
        """Next number of every stream, (B', L')."""
        return self._part.take(self._streams.uniform(self._part.active))

    def normal(self, size: int) -> Tensor:
        """Next normal numbers of every stream.

        Args:
            size: how many per token.

        Returns:
            (B', L', size).
        """
        return self._part.take(self._streams.normal(size))

    def seeds(self) -> Tensor:
        """Next seed of every stream, (B', L'), on the host."""
        return self._part.take(self._streams.seeds().to(self.device)).cpu()

    def branch(self, number: int) -> ActiveTokens:
        """Independent streams of the same tokens.

        Args:
            number: which; 0 for these.

        Returns:
            The streams.
        """
        return ActiveTokens(self._streams.branch(number), self._part)

    def count(self, evaluations: Tensor, going: Tensor | None) -> None:
        """Count one evaluation.

        Args:
            evaluations: per token, (B, L), int64; changed in place.
            going: rows that have not settled, (B,), bool, or None for all.
        """
        evaluations += self._part.active

    def keep(self, memory: Tensor, earlier: Tensor | None) -> Tensor:
        """What is remembered of the evaluations so far.

        Args:
            memory: of this one.
            earlier: of those before, (B, L, M), or None.

        Returns:
            (B, L, M).
        """
        new = self._part.put(memory)
        return new if earlier is None else torch.where(self._part.active[..., None], new, earlier)

    def rows(self, values: Tensor) -> Tensor:
        """Values of the rows asked about.

        Args:
            values: (B, ...).

        Returns:
            (B', ...).
        """
        return values[self._part.rows[:, 0]]

    def spread(self, values: Tensor) -> Tensor:
        """Values for all rows, NaN where nothing was asked.

        Args:
            values: (B',), float.

        Returns:
            (B,), float32.
        """
        out = torch.full((len(self._part.active),), torch.nan, device=values.device)
        out[self._part.rows[:, 0]] = values.float()
        return out


class Sliced:
    """The random numbers of a block, handed out to pieces of it as if each piece asked for the whole.

    Args:
        random: of the whole block.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self._drawn: list[Tensor] = []

    def of(self, part: slice) -> Random:
        """Random numbers of a piece.

        Args:
            part: its positions.

        Returns:
            The numbers that these positions get whatever the pieces are.
        """
        return _Slice(self, part)

    def draw(self, number: int, how: Callable[[Random], Tensor]) -> Tensor:
        """Numbers of the whole block.

        Args:
            number: which draw this is, from 0.
            how: makes it, the first time.

        Returns:
            (B, L, ...).
        """
        if number == len(self._drawn):
            self._drawn.append(how(self.random))
        return self._drawn[number]


class _Slice:
    def __init__(self, whole: Sliced, part: slice) -> None:
        self._whole, self._part, self._calls = whole, part, 0

    @property
    def device(self) -> torch.device:
        return self._whole.random.device  # type: ignore[no-any-return]

    def uniform(self) -> Tensor:
        return self._next(lambda random: random.uniform())

    def normal(self, size: int) -> Tensor:
        return self._next(lambda random: random.normal(size))

    def seeds(self) -> Tensor:
        return self._next(lambda random: random.seeds())

    def _next(self, how: Callable[[Random], Tensor]) -> Tensor:
        self._calls += 1
        return self._whole.draw(self._calls - 1, how)[:, self._part]
