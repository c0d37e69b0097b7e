"""A batch of rows on its way through the network: as it comes, or captured once as a CUDA graph and replayed.

A token costs a pass of the network per evaluation, and on a GPU most of the time of a pass goes by while Python says
what is to be done. Where nothing but numbers changes from token to token, it is said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import override

from l2d_framework.backbone import Backbone
from l2d_framework.diffusion.ode import NotAhead
from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.diffusion.sampler import Block, Denoised, Sampler
from l2d_framework.types import Context


class Rows:
    """What the backbone remembers of the rows that go on.

    Args:
        sampler: denoises what comes next.
        context: what the backbone has read.
        slots: how wide that is: the last tokens of all rows stand in the last slot, shorter rows begin later.
    """

    def __init__(self, sampler: Sampler, context: Context, slots: int) -> None:
        self.sampler, self.context, self.slots = sampler, context, slots

    @property
    def is_replayed(self) -> bool:
        """Whether other rows would have to be captured anew."""
        return False

    @property
    def backbone(self) -> Backbone:
        """The network."""
        return self.sampler.diffusion.backbone

    def extend(self, tokens: Tensor) -> None:
        """Read further tokens, (B, N)."""
        if tokens.shape[1]:
            self.context = self.backbone.extend(self.context, tokens)
            self.slots += tokens.shape[1]

    def rewind(self, counts: Tensor) -> None:
        """Take tokens back, so many of each row, (B,)."""
        self.context = self.backbone.rewind(self.context, counts)
        self.slots -= int(counts.min())

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only, (B',)."""
        self.context = self.context.select(rows)

    def select(self, rows: Tensor) -> Rows:
        """Copies of some rows, (B',)."""
        return Rows(self.sampler, self.context.select(rows), self.slots)

    def join(self, others: Sequence[Rows], slots: int) -> Rows:
        """These rows and others behind them, in so many slots; nothing of any of them is to be used afterwards."""
        if not others and slots == self.slots:
            return self
        contexts = [self.context, *(other.context for other in others)]
        return Rows(self.sampler, self.backbone.join(contexts, slots), slots)

    def denoise(self, tokens: Tensor, ask: Callable[[bool], Block]) -> Denoised:
        """Read further tokens, and denoise the block that is asked about then, with the sequence so far or without."""
        self.extend(tokens)
        return self.sampler(replace(ask(True), context=self.context))


class Graph(Protocol):
    """Work on tensors that stay where they are, which is done again without Python."""

    def __call__(self, work: Callable[[], Any]) -> Any:
        """Do the work, the first time by capturing it.

        Args:
            work: makes tensors; the same at every call.

        Returns:
            What it made the first time, with the numbers of this time.
        """
        ...


_CAPTURE = Lock()
"""Held while a graph is captured: torch can do one at a time in a process."""


class CudaGraph:
    """`Graph` of an NVIDIA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: Any = None
        self._made: Any = None

    def __call__(self, work: Callable[[], Any]) -> Any:
        """Do the work."""
        with torch.cuda.device(self._device):
            if self._graph is None:
                self._capture(work)
            self._graph.replay()
        return self._made

    def _capture(self, work: Callable[[], Any]) -> None:
        graph, stream, before = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
        with _CAPTURE:
            try:
                # Other threads may well ask for memory meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._made = work()
            finally:
                # Where a capture has failed, torch stays on its stream.
                torch.cuda.set_stream(before)
        self._graph = graph


class Replayed(Rows):
    """Rows that take one token each, again and again; those that have ended run along until half of them have.

    Keys and values have room for `_room` slots, which is made in steps, so that a long answer that ends soon costs
    little. A guidance must be a function of what it is given: what Python counts is the same at every replay.
    """

    def __init__(self, rows: Rows, context: Context, room: int, most: int) -> None:
        super().__init__(rows.sampler, context, rows.slots)
        self._room, self._most = room, most
        self._begin(context)

    @classmethod
    def of(cls, rows: Rows, most: int) -> Rows:
        """Rows to be replayed, where device and backbone can; `most` is how many slots they may fill."""
        lm: Any = rows.backbone.lm
        if lm.device.type not in GRAPHS or len(set(getattr(lm, "hf_device_map", {}).values())) > 1:
            return rows
        if rows.backbone.is_offloaded:  # weights come and go, which no graph can
            return rows
        if repr(rows.sampler.sampling.guidance) in _REFUSED.get(rows.backbone, ()):
            return rows
        room = min(most, rows.slots + _STEP)
        try:
            context = rows.backbone.fixed(rows.context, room, most)
        except torch.OutOfMemoryError:
            return rows
        return rows if context is None else cls(rows, context, room, most)

    @property
    @override
    def is_replayed(self) -> bool:
        return self._graph is not None

    def _begin(self, context: Context) -> None:
        self.context = context
        self._alive: Tensor | None = None
        self._graph: Graph | None = GRAPHS[self.backbone.lm.device.type](self.backbone.lm.device)
        self._tape: _Tape | None = None

    @override
    def keep(self, rows: Tensor) -> None:
        alive = rows if self._alive is None else self._alive[rows]
        if self._graph is None:
            super().keep(rows)
        elif self._tape is None or 2 * len(alive) <= len(self._tape.tokens):
            self._begin(self.context.select(alive))
        else:
            self._alive = alive

    @override
    def join(self, others: Sequence[Rows], slots: int) -> Rows:
        if not others:
            return self
        if self._alive is not None:
            self.context = self.context.select(self._alive)
        return super().join(others, slots)

    @override
    def denoise(self, tokens: Tensor, ask: Callable[[bool], Block]) -> Denoised:
        if self.slots == self._room:
            self._widen()
        if self._graph is None:
            return super().denoise(tokens, ask)
        self.slots += 1
        block = ask(False)
        if self._tape is None:
            # The first token is not captured: it shows which numbers are drawn, and makes what is made once.
            self._tape = _Tape(tokens, block)
            try:
                found = self._work(self._tape)
            except NotAhead:
                self._graph = None
                return self.sampler(replace(ask(True), context=self.context))
        else:
            found = self._again(self._graph, self._tape, tokens, block)
        found.check()
        return found

    def _widen(self) -> None:
        """More room, of the rows that go on."""
        context = self.context if self._alive is None else self.context.select(self._alive)
        self._room = min(self._most, 2 * self._room)
        wider = self.backbone.fixed(context, self._room, self._most)
        assert wider is not None
        if self._graph is None:
            self.context = wider
        else:
            self._begin(wider)

    def _again(self, graph: Graph, tape: _Tape, tokens: Tensor, block: Block) -> Denoised:
        tape.fill(tokens, block, self._alive)
        alive = self._alive
        try:
            found: Denoised = graph(lambda: self._work(tape))
        except RuntimeError as error:
            warnings.warn(f"Tokens are not replayed from a graph, since {error}", UserWarning, stacklevel=2)
            _REFUSED.setdefault(self.backbone, set()).add(repr(self.sampler.sampling.guidance))
            tape.rewind()
            found = self._work(tape)
            self._graph = None
            if alive is not None:
                self.context, self._alive = self.context.select(alive), None
        return found if alive is None else found.select(alive)

    def _work(self, tape: _Tape) -> Denoised:
        self.context = self.backbone.extend(self.context, tape.tokens)
        return self.sampler.solve(_TapedBlock(**vars(tape.block) | {"context": self.context}, tape=tape))


GRAPHS: dict[str, Callable[[torch.device], Graph]] = {"cuda": CudaGraph}
"""How work is captured, by type of device."""

_REFUSED: WeakKeyDictionary[Backbone, set[str]] = WeakKeyDictionary()
"""Guidances with which a network could not be captured."""

_STEP = 256
"""Slots for which there is room at first, beyond those that are filled."""


@dataclass
class _Draw:
    purpose: str
    branch: int
    how: Callable[[TokenStreams], Tensor]
    numbers: Tensor


class _Tape:
    """What changes from token to token, in tensors that stay where they are."""

    def __init__(self, tokens: Tensor, block: Block) -> None:
        self.tokens = tokens.clone()
        # Without what the backbone remembers, which is that of the work and would be held twice.
        nothing: Any = None
        self.block = replace(block, layout=None, context=nothing, positions=block.positions.clone())
        self._draws: list[_Draw] = []
        self._next: int | None = None

    def fill(self, tokens: Tensor, block: Block, alive: Tensor | None) -> None:
        """Put in what belongs to the next token of the rows that go on."""
        streams = {draw.purpose: block.streams(draw.purpose) for draw in self._draws}
        pairs = [(self.tokens, tokens), (self.block.positions, block.positions)]
        pairs += [(draw.numbers, draw.how(streams[draw.purpose].branch(draw.branch))) for draw in self._draws]
        for old, new in pairs:
            if alive is None:
                old.copy_(new)
            else:
                old[alive] = new
        self.rewind()

    def rewind(self) -> None:
        """Hand out the numbers from the first on."""
        self._next = 0

    def draw(self, purpose: str, branch: int, streams: TokenStreams, how: Callable[[TokenStreams], Tensor]) -> Tensor:
        """The next numbers: new ones the first time, from then on those that `fill` has put in."""
        if self._next is None:
            self._draws.append(_Draw(purpose, branch, how, how(streams).clone()))
            return self._draws[-1].numbers
        self._next += 1
        return self._draws[self._next - 1].numbers


@dataclass(frozen=True)
class _TapedBlock(Block):
    tape: _Tape | None = None

    @override
    def streams(self, purpose: str) -> TokenStreams:
        assert self.tape is not None
        return _TapedStreams(self.tape, purpose, 0, super().streams(purpose))


class _TapedStreams(TokenStreams):
    """Random streams whose numbers are those on a tape."""

    def __init__(self, tape: _Tape, purpose: str, number: int, streams: TokenStreams) -> None:
        self._tape, self._purpose, self._number, self._streams = tape, purpose, number, streams
        self.device = streams.device

    @override
    def branch(self, number: int) -> TokenStreams:
        return self if not number else _TapedStreams(self._tape, self._purpose, number, self._streams.branch(number))

    @override
    def uniform(self, active: Tensor | None = None) -> Tensor:
        return self._tape.draw(self._purpose, self._number, self._streams, TokenStreams.uniform)

    @override
    def normal(self, size: int) -> Tensor:
        return self._tape.draw(self._purpose, self._number, self._streams, lambda streams: streams.normal(size))

    @override
    def seeds(self) -> Tensor:
        raise NotAhead
