"""The tokens of a block that a solver asks about, and their random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.types import Context, Query, Random


@dataclass(frozen=True)
class Selection:
    """All tokens of a block, or some as a smaller block: rows with any, and in each the active positions first.

    It is the `Random` of its tokens; of the streams of `uniform`, only theirs advance.
    """

    streams: TokenStreams  # of the whole block
    active: Tensor | None = None  # which tokens, (B, L), bool; all when None
    places: tuple[Tensor, Tensor] | None = None  # rows (B', 1) and columns (B', L') of the smaller block's tokens
    for_good: bool = False  # nobody asks about the other rows again, so that anything may stand there

    @classmethod
    def of(cls, streams: TokenStreams, active: Tensor, rows: Tensor) -> Selection:
        """The active tokens, in the rows that have some, (B',), int64."""
        width = int(active.sum(1).max())
        columns = (~active[rows]).long().argsort(stable=True, dim=1)[:, :width]
        return cls(streams, active, (rows[:, None], columns))

    @classmethod
    def rest(cls, streams: TokenStreams, going: Tensor, width: int) -> Selection:
        """All `width` tokens of the rows that go on, (B,), bool, the only ones from now on."""
        rows = going.nonzero()[:, 0]
        columns = torch.arange(width, device=rows.device).expand(len(rows), -1)
        return cls(streams, going[:, None].expand(-1, width), (rows[:, None], columns), for_good=True)

    def take(self, values: Tensor) -> Tensor:
        """Values of the smaller block, (B', L', ...), from those of the whole, (B, L, ...)."""
        return values if self.places is None else values[self.places]

    def put(self, values: Tensor) -> Tensor:
        """Values of the smaller block, (B', L', ...), at their tokens of the whole, (B, L, ...), zero elsewhere."""
        if self.active is None or self.places is None:
            return values
        if self.for_good:
            # An index keeps small what a state space keeps as tokens and seeds.
            return values[(self.active[:, 0].cumsum(0) - 1).clamp_min(0)]
        out = values.new_zeros(*self.active.shape, *values.shape[2:])
        out[self.places] = values
        return torch.where(self.active[..., None], out, 0)

    def query(self, query: Query, context: Context) -> Query:
        """A query about the smaller block from one about the whole, with the context of the rows asked about."""
        optional = {"condition": query.condition, "previous": query.previous, "guidance_scale": query.guidance_scale}
        taken: dict[str, Any] = {name: self.take(value) for name, value in optional.items() if value is not None}
        return replace(
            query,
            x=self.take(query.x),
            t=self.take(query.t),
            positions=self.take(query.positions),
            context=context,
            **taken,
        )

    @property
    def device(self) -> torch.device:
        """Where the numbers are wanted."""
        return self.streams.device

    def uniform(self) -> Tensor:
        """Next number of every stream, (B', L')."""
        return self.take(self.streams.uniform(self.active))

    def normal(self, size: int) -> Tensor:
        """Next normal numbers of every stream, (B', L', size)."""
        return self.take(self.streams.normal(size))

    def seeds(self) -> Tensor:
        """Next seed of every stream, (B', L'), on the host."""
        seeds = self.streams.seeds()
        return seeds if self.places is None else self.take(seeds.to(self.device)).cpu()

    def branch(self, number: int) -> Selection:
        """Independent streams of the same tokens; 0 for these."""
        return replace(self, streams=self.streams.branch(number))

    def count(self, evaluations: Tensor, going: Tensor | None) -> None:
        """Add one evaluation, in place, to the tokens' (B, L), int64, in the rows that have not settled, (B,), bool."""
        if self.active is not None:
            evaluations += self.active
        else:
            evaluations += 1 if going is None else going[:, None].to(evaluations)

    def keep(self, memory: Tensor, earlier: Tensor | None) -> Tensor:
        """What is remembered, (B, L, M): of this evaluation, (B', L', M), over what was of those before."""
        new = self.put(memory)
        if self.active is None or earlier is None or self.for_good:
            return new
        return torch.where(self.active[..., None], new, earlier)

    def rows(self, values: Tensor) -> Tensor:
        """Values of the rows asked about, (B', ...), from those of all, (B, ...)."""
        return values if self.places is None else values[self.places[0][:, 0]]

    def spread(self, values: Tensor, rest: float = torch.nan) -> Tensor:
        """Values of the rows asked about, (B',), among those of all, (B,), with `rest` where nothing was asked."""
        if self.active is None or self.places is None:
            return values
        out = values.new_full((len(self.active),), rest)
        out[self.places[0][:, 0]] = values
        return out


class Sliced:
    """The random numbers of a block, handed out to pieces of it as if each piece asked for the whole."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self._drawn: list[Tensor] = []

    def of(self, part: slice) -> Random:
        """Random numbers of some positions, which get the same whatever the pieces are."""
        return _Slice(self, part)

    def draw(self, number: int, how: Callable[[Random], Tensor]) -> Tensor:
        """Draw `number` of the whole block, (B, L, ...), which `how` makes the first time."""
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
