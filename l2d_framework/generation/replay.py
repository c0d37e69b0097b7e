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
from l2d_framework.diffusion.selection import Selection
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
        if cls.kind(rows.sampler) in _REFUSED.get(rows.backbone, ()):
            return rows
        room = min(most, rows.slots + _STEP)
        try:
            context = rows.backbone.fixed(rows.context, room, most)
        except torch.OutOfMemoryError:
            return rows
        return rows if context is None else cls(rows, context, room, most)

    @classmethod
    def kind(cls, sampler: Sampler) -> tuple[Any, ...]:
        """What decides whether such rows can be captured."""
        return cls, repr(sampler.sampling.guidance), sampler.compile

    @property
    @override
    def is_replayed(self) -> bool:
        return self._graph is not None

    def _begin(self, context: Context) -> None:
        self.context = context
        self._tokens: Tensor | None = None  # the last ones, (B, 1), where those of every token stand
        self._alive: Tensor | None = None
        self._graph: Graph | None = self.new_graph()
        self._tape: _Tape | None = None

    def new_graph(self) -> Graph:
        """A graph of the device."""
        device = self.backbone.lm.device
        return GRAPHS[device.type](device)

    @override
    def keep(self, rows: Tensor) -> None:
        alive = rows if self._alive is None else self._alive[rows]
        if self._graph is None:
            super().keep(rows)
        elif self._tokens is None or 2 * len(alive) <= len(self._tokens):
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
        try:
            found = self._replay(tokens, ask(False))
        except NotAhead:
            self._stop()
            found = self.sampler.solve(replace(ask(True), context=self.context))
        found.check()
        return found

    def _replay(self, tokens: Tensor, block: Block) -> Denoised:
        if self._tokens is None:
            # The first token is not captured: it shows which numbers are drawn, and makes what is made once.
            self._tokens = tokens.clone()
            self._tape = _Tape(block)
            return self._work(self._tape)
        assert self._tape is not None
        put(self._tokens, tokens, self._alive)
        tape, alive = self._tape, self._alive
        tape.fill(block, alive)
        found: Denoised = self._captured(self._graph, lambda: self._work(tape))
        if self._graph is None:
            self._stop()
        return found if alive is None else found.select(alive)

    def _captured(self, graph: Graph | None, work: Callable[[], Any]) -> Any:
        """Work done by a graph, or plainly where it has none or cannot be captured, which ends its graphs."""
        if graph is None or self._graph is None:
            return work()
        try:
            return graph(work)
        except RuntimeError as error:
            warnings.warn(f"Tokens are not replayed from a graph, since {error}", UserWarning, stacklevel=2)
            if not isinstance(error, torch.OutOfMemoryError):  # which may well pass
                _REFUSED.setdefault(self.backbone, set()).add(self.kind(self.sampler))
            self._graph = None
            return work()

    def _stop(self) -> None:
        """Go on without graphs, and with the rows that go on alone."""
        self._graph = None
        if self._alive is not None:
            self.context, self._alive = self.context.select(self._alive), None

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

    def _work(self, tape: _Tape) -> Denoised:
        assert self._tokens is not None
        tape.numbers.rewind()
        self.context = self.backbone.extend(self.context, self._tokens)
        return self.sampler.solve(_TapedBlock(**vars(tape.block) | {"context": self.context}, tape=tape))


def put(old: Tensor, new: Tensor, rows: Tensor | None) -> None:
    """Copy values to some rows, or all."""
    if rows is None:
        old.copy_(new)
    else:
        old[rows] = new


GRAPHS: dict[str, Callable[[torch.device], Graph]] = {"cuda": CudaGraph}
"""How work is captured, by type of device."""

_REFUSED: WeakKeyDictionary[Backbone, set[tuple[Any, ...]]] = WeakKeyDictionary()
"""Kinds of rows that could not be captured, of each network."""

_STEP = 256
"""Slots for which there is room at first, beyond those that are filled."""


@dataclass
class _Draw:
    purpose: str
    branch: int
    how: Callable[[Any], Tensor]
    numbers: Tensor


class Numbers:
    """Random numbers in tensors that stay where they are.

    Args:
        room: makes such a tensor, with the first numbers in it.
    """

    def __init__(self, room: Callable[[Tensor], Tensor]) -> None:
        self._room = room
        self._draws: list[_Draw] = []
        self._next: int | None = None

    def fill(self, streams: Callable[[str], TokenStreams | Selection], rows: Tensor | None) -> None:
        """Put in new ones of some rows, or all, from the streams of each purpose."""
        known = {purpose: streams(purpose) for purpose in {draw.purpose for draw in self._draws}}
        for draw in self._draws:
            put(draw.numbers, draw.how(known[draw.purpose].branch(draw.branch)), rows)

    def rewind(self) -> None:
        """Hand out the numbers from the first on, once it is known which are asked for."""
        self._next = 0 if self._draws else None

    def draw(
        self, purpose: str, branch: int, streams: TokenStreams | Selection, how: Callable[[Any], Tensor]
    ) -> Tensor:
        """The next numbers: new ones the first time, from then on those that `fill` has put in."""
        if self._next is None:
            self._draws.append(_Draw(purpose, branch, how, self._room(how(streams))))
            return self._draws[-1].numbers
        self._next += 1
        return self._draws[self._next - 1].numbers


class _Tape:
    """What changes from token to token, in tensors that stay where they are."""

    def __init__(self, block: Block) -> None:
        # Without what the backbone remembers, which is that of the work and would be held twice.
        nothing: Any = None
        self.block = replace(block, layout=None, context=nothing, positions=block.positions.clone())
        self.numbers = Numbers(Tensor.clone)

    def fill(self, block: Block, alive: Tensor | None) -> None:
        """Put in what belongs to the next token of the rows that go on."""
        put(self.block.positions, block.positions, alive)
        self.numbers.fill(block.streams, alive)


@dataclass(frozen=True)
class _TapedBlock(Block):
    tape: _Tape | None = None

    @override
    def streams(self, purpose: str) -> TokenStreams:
        assert self.tape is not None
        return TapedStreams(self.tape.numbers, purpose, 0, super().streams(purpose))


class TapedStreams(TokenStreams):
    """Random streams whose numbers stay where they are."""

    def __init__(self, numbers: Numbers, purpose: str, number: int, streams: TokenStreams | Selection) -> None:
        self._numbers, self._purpose, self._number, self._streams = numbers, purpose, number, streams
        self.device = streams.device

    @override
    def branch(self, number: int) -> TokenStreams:
        if not number:
            return self
        return TapedStreams(self._numbers, self._purpose, number, self._streams.branch(number))

    @override
    def uniform(self, active: Tensor | None = None) -> Tensor:
        return self._numbers.draw(self._purpose, self._number, self._streams, lambda streams: streams.uniform())

    @override
    def normal(self, size: int) -> Tensor:
        return self._numbers.draw(self._purpose, self._number, self._streams, lambda streams: streams.normal(size))

    @override
    def seeds(self) -> Tensor:
        raise NotAhead
