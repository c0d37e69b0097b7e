"""The differential equation of a block of tokens, as a solver sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from l2d_framework.guidance import Guidance
from l2d_framework.noise import TokenStreams
from l2d_framework.parametrization import Parametrization
from l2d_framework.process import Process
from l2d_framework.schedule import Schedule
from l2d_framework.solver import Time, as_time
from l2d_framework.types import Predict, Prediction, Query, Space


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network, for observers.

    Attributes:
        positions: slots asked about, (B, L), int64.
        t: times, (B, L), float32.
        x: noisy states, (B, L, D), float32.
        logits: guided logits, (B, L, V), float32.
        is_read_out: True for the evaluation whose logits yield the tokens.
    """

    positions: Tensor
    t: Tensor
    x: Tensor
    logits: Tensor
    is_read_out: bool


Observer = Callable[[Evaluation], None]


@dataclass(frozen=True)
class Streams:
    """Random streams of one block.

    Attributes:
        estimate: for estimates that draw.
        fresh: for solvers that add noise.
        repeat: draw the same numbers at every evaluation, so that the slope is a function of state and time. A solver
            that compares slopes to choose its steps would otherwise mistake the dice for an error of its own.
    """

    estimate: TokenStreams
    fresh: TokenStreams
    repeat: bool = False


class TokenProblem:
    """Turns predictions into clean states and velocities, and counts evaluations.

    Tokens that a solver declares inactive are left out of the network's batch, not merely masked.

    Args:
        process: the model.
        query: positions, context, condition and guidance scale of the block; its state and time are ignored.
        guidance: wrappers around prediction, the first is innermost.
        parametrization: the model's, with the request's estimate options.
        codebook: what `parametrization.codebook` returned.
        streams: random streams of the block.
        observer: called after every evaluation, or None.
    """

    def __init__(
        self,
        process: Process,
        query: Query,
        *,
        guidance: Sequence[Guidance],
        parametrization: Parametrization,
        codebook: Tensor,
        streams: Streams,
        observer: Observer | None = None,
    ) -> None:
        self._process, self._query, self._guidance = process, query, guidance
        self._parametrization, self._codebook = parametrization, codebook
        self._streams, self._observer = streams, observer
        self._previous: Tensor | None = None
        self._rows: Tensor | None = None
        self._context = query.context
        self.evaluations = torch.zeros_like(query.positions)

    @property
    def schedule(self) -> Schedule:
        """The noise law."""
        return self._process.schedule

    def fresh_noise(self, x: Tensor) -> Tensor:
        """New noise from the prior.

        Args:
            x: a state, for its width.

        Returns:
            (B, L, D), with the prior's standard deviation.
        """
        return self._parametrization.prior_scale * self._streams.fresh.normal(x.shape[-1])

    def velocity(self, x: Tensor, t: Time, *, until: Time | None = None, active: Tensor | None = None) -> Tensor:
        """Slope dx/dt.

        Args:
            x: (B, L, D), float.
            t: time of `x`, below 1.
            until: time the move made with this slope leads to; `t` when None.
            active: tokens to evaluate, (B, L), bool; all when None.

        Returns:
            (B, L, D); zero where not active.
        """
        clean = self.clean(x, t, until=until, active=active)
        slope = self.schedule.velocity(x, clean, as_time(t, x))
        return slope if active is None else torch.where(active[..., None], slope, 0)

    def clean(self, x: Tensor, t: Time, *, until: Time | None = None, active: Tensor | None = None) -> Tensor:
        """Estimate of the clean state.

        Args:
            x: (B, L, D), float.
            t: time of `x`.
            until: time the move made with this estimate leads to; `t` when None.
            active: tokens to evaluate, (B, L), bool; all when None.

        Returns:
            (B, L, D); zero where not active.
        """
        query = self._at(x, t)
        until_t = query.t if until is None else as_time(until, x).float()
        if active is None:
            return self._evaluate(query, until_t, _All(self._streams.estimate))[1]
        part = self._compact(active)
        _, found = self._evaluate(part.query(query), part.take(until_t), _Part(self._streams.estimate, part))
        return part.put(found)

    def read_out(self, x: Tensor, t: float) -> Tensor:
        """Logits that yield the tokens, from the last evaluation.

        Args:
            x: state at the end, (B, L, D), float.
            t: the end time.

        Returns:
            (B, L, V), float32.
        """
        query = self._at(x, t)
        return self._evaluate(query, query.t, _All(self._streams.estimate), is_read_out=True)[0]

    def _at(self, x: Tensor, t: Time) -> Query:
        shared = None if isinstance(t, Tensor) else float(t)
        return self._query.replace(x=x.float(), t=as_time(t, x).float(), shared_time=shared, previous=self._previous)

    def _evaluate(
        self, query: Query, until: Tensor, random: _All | _Part, *, is_read_out: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits and clean state; the read-out needs no clean state and gets an empty one."""
        if self._streams.repeat:
            self._streams.estimate.rewind()
        space = _Space(self._process, self._parametrization, self._codebook, until, random)
        predict: Predict = self._process
        for guidance in self._guidance:
            predict = _Guided(predict, guidance, space)
        prediction = predict(query)
        random.count(self.evaluations)
        if self._parametrization.uses_previous:
            self._previous = random.keep(prediction.logits, self._previous)
        if self._observer is not None:
            self._observer(Evaluation(query.positions, query.t, query.x, prediction.logits, is_read_out))
        if is_read_out:
            return prediction.logits, prediction.logits.new_empty(0)
        clean = space.estimate(prediction.logits) if prediction.clean is None else prediction.clean
        return prediction.logits, clean

    def _compact(self, active: Tensor) -> _Subset:
        rows = active.any(1).nonzero()[:, 0]
        if len(rows) == len(active):
            context = self._query.context
        elif self._rows is not None and torch.equal(rows, self._rows):
            context = self._context
        else:
            self._rows, self._context = rows, self._query.context.select(rows)
            context = self._context
        return _Subset(rows, active, context)


class _Subset:
    """The active tokens of a block as a smaller block: rows with any, and in each the active positions first."""

    def __init__(self, rows: Tensor, active: Tensor, context: object) -> None:
        width = int(active.sum(1).max())
        order = (~active[rows]).long().argsort(stable=True, dim=1)[:, :width]
        self.rows, self.columns, self.active, self.context = rows[:, None], order, active, context

    def take(self, values: Tensor) -> Tensor:
        return values[self.rows, self.columns]

    def put(self, values: Tensor) -> Tensor:
        out = values.new_zeros(*self.active.shape, *values.shape[2:])
        out[self.rows, self.columns] = values
        return torch.where(self.active[..., None], out, 0)

    def query(self, query: Query) -> Query:
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


class _All:
    """Random numbers for all tokens of the block."""

    def __init__(self, streams: TokenStreams) -> None:
        self._streams = streams

    def uniform(self) -> Tensor:
        return self._streams.uniform()

    def normal(self, size: int) -> Tensor:
        return self._streams.normal(size)

    def branch(self, number: int) -> _All:
        return _All(self._streams.branch(number))

    def count(self, evaluations: Tensor) -> None:
        evaluations += 1

    def keep(self, logits: Tensor, earlier: Tensor | None) -> Tensor:
        return logits


class _Part:
    """Random numbers for the active tokens; only their streams advance."""

    def __init__(self, streams: TokenStreams, part: _Subset) -> None:
        self._streams, self._part = streams, part

    def uniform(self) -> Tensor:
        return self._part.take(self._streams.uniform(self._part.active))

    def normal(self, size: int) -> Tensor:
        return self._part.take(self._streams.normal(size))

    def branch(self, number: int) -> _Part:
        return _Part(self._streams.branch(number), self._part)

    def count(self, evaluations: Tensor) -> None:
        evaluations += self._part.active

    def keep(self, logits: Tensor, earlier: Tensor | None) -> Tensor:
        new = self._part.put(logits)
        return new if earlier is None else torch.where(self._part.active[..., None], new, earlier)


@dataclass
class _Space:
    process: Process
    parametrization: Parametrization
    codebook: Tensor
    until: Tensor
    random: _All | _Part
    estimates: int = 0

    def estimate(self, logits: Tensor) -> Tensor:
        # Streams per branch, so that what one branch draws does not depend on whether there is another.
        random = self.random.branch(self.estimates)
        self.estimates += 1
        return self.parametrization.estimate(logits, self.until, self.codebook, random)

    def encode(self, tokens: Tensor) -> Tensor:
        return self.parametrization.encode(tokens, self.process.backbone.table())


@dataclass(frozen=True)
class _Guided:
    predict: Predict
    guidance: Guidance
    space: Space

    def __call__(self, query: Query) -> Prediction:
        return self.guidance(self.predict, query, self.space)

    def together(self, queries: list[Query]) -> list[Prediction]:
        return [self(query) for query in queries]
