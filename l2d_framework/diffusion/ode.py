"""The differential equation of a block of tokens, as a solver sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from l2d_framework.blame import described
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.early_stop import EarlyStop
from l2d_framework.diffusion.logits import CHUNK, Logits, top_token
from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.diffusion.selection import Selection, Sliced
from l2d_framework.errors import PluginError
from l2d_framework.guidance import Guidance
from l2d_framework.parametrization import Parametrization
from l2d_framework.schedule import NoiseLaw
from l2d_framework.solver import Problem, Solver, Time, as_time
from l2d_framework.types import Context, Layout, Predict, Prediction, Query, Random, Space, Stride


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network, for observers; all logits of the block are made when there is one."""

    positions: Tensor  # slots asked about, (B, L), int64
    t: Tensor  # times, (B, L), float32
    x: Tensor  # noisy states, (B, L, D), float32
    logits: Tensor  # guided, (B, L, V), float32
    is_read_out: bool  # whether its logits yield the tokens


Observer = Callable[[Evaluation], None]


@dataclass(frozen=True)
class Streams:
    """Random streams of one block."""

    estimate: TokenStreams  # for estimates that draw
    fresh: TokenStreams  # for solvers that add noise
    repeat: bool = False
    """Draw the same numbers at every evaluation, so that the slope is a function of state and time. A solver that
    compares slopes to choose its steps would otherwise mistake the dice for an error of its own."""


class NotAhead(Exception):
    """Something is asked for that is not known ahead: the sequence, numbers on the host, which evaluation it is."""


_BY_ROW = ("x", "t", "positions", "condition", "previous", "guidance_scale")


@dataclass(frozen=True)
class Asked:
    """What an evaluation depends on beside its random numbers, about the tokens asked about."""

    query: Query
    ahead: Tensor | None  # time of the estimate's temperature, (B', L'); None at the read-out, which moves no more
    carried: list[Tensor]  # hidden states that each question of a guidance goes on from, (B', L', H)
    count: int | None  # evaluations before this one; None where it is to be the same whatever that is

    @property
    def by_row(self) -> list[Tensor | None]:
        """Everything that has rows, the context aside."""
        return [*(getattr(self.query, name) for name in _BY_ROW), self.ahead, *self.carried]

    def with_rows(self, values: list[Any], context: Context) -> Asked:
        """The same with other rows in the order of `by_row`, whatever the count."""
        fields, (ahead, *carried) = values[: len(_BY_ROW)], values[len(_BY_ROW) :]
        query = self.query.replace(context=context, **dict(zip(_BY_ROW, fields, strict=True)))
        return Asked(query, ahead, carried, None)


@dataclass(frozen=True)
class Answered:
    """What an evaluation made, about the tokens asked about."""

    logits: Logits
    clean: Tensor  # state to move towards, (B', L', D); empty at the read-out
    memory: Tensor | None  # what is remembered of the logits, (B', L', M)
    tokens: Tensor | None  # the likeliest, (B', L'), where somebody looks at them
    hidden: list[Tensor]  # states that go on, by question, (B', L', H)
    unsound: dict[int, Tensor]  # rows with a NaN, (B',), by guidance

    def select(self, rows: Tensor) -> Answered:
        """A copy of some rows, (B'',)."""
        return Answered(
            replace(self.logits, values=self.logits.values[rows]),
            self.clean[rows] if len(self.clean) else self.clean,
            None if self.memory is None else self.memory[rows],
            None if self.tokens is None else self.tokens[rows],
            [state[rows] for state in self.hidden],
            {guidance: found[rows] for guidance, found in self.unsound.items()},
        )


class TokenODE(Problem):
    """Turns predictions into clean states and velocities, and counts evaluations.

    Tokens that a solver declares inactive are left out of the network's batch, not merely masked, and so are rows that
    have settled, unless an observer wants to see them. State and time of the `query` are ignored; where a guidance asks
    for the layout and there is none, `NotAhead` is raised.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        query: Query,
        *,
        guidance: Sequence[Guidance],
        parametrization: Parametrization,
        codebook: Tensor,
        streams: Streams,
        layout: Layout | None = None,
        patience: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._diffusion, self._query, self._guidance = diffusion, query, guidance
        self._parametrization, self._codebook = parametrization, codebook
        self._streams, self._observer = streams, observer
        self._layout = layout
        self._previous: Tensor | None = None
        self._carried: list[Tensor] = []
        self._rows: Tensor | None = None
        self._context = query.context
        self._early_stop = None if patience is None else EarlyStop(patience, len(query.positions))
        self._token_count = query.positions.numel()
        self._count = 0
        self._moves: tuple[Solver, list[float], int] | None = None
        self._known: list[float] | None = None  # the only times that come again, where a solver chooses its own
        self._unsound: dict[int, Tensor] = {}
        # Evaluations of the network spent on each token, (B, L); and by name one (B,) per evaluation.
        self.evaluations = torch.zeros_like(query.positions)
        self.metrics: dict[str, list[Tensor]] = {}

    def solve(self, solver: Solver, x: Tensor, times: list[float]) -> Tensor:
        """State at times[-1] from that at times[0], (B, L, D); estimates learn how far each move leads."""
        self._moves = None if solver.is_adaptive else (solver, times, self._count)
        self._known = times if solver.is_adaptive else None
        return solver.solve(self, x, times)

    def _stride(self) -> Stride:
        """The move that the next evaluation is for."""
        if self._moves is None:
            return Stride()
        solver, times, begun = self._moves
        # By count, since a time of the grid belongs to the interval that ends there and to the one that begins.
        interval = min((self._count - begun) // solver.stages, len(times) - 2)
        return Stride(times[interval + 1] - times[interval], solver.stages, solver.evaluates_end)

    @property
    @override
    def schedule(self) -> NoiseLaw:
        return self._diffusion.schedule

    @override
    def fresh_noise(self, x: Tensor) -> Tensor:
        return self._parametrization.prior_scale * self._parametrization.noise(self._streams.fresh)

    @override
    def velocity(self, x: Tensor, t: Time, *, active: Tensor | None = None) -> Tensor:
        clean = self.clean(x, t, active=active)
        slope = self.schedule.velocity(x, clean, as_time(t, x))
        return slope if active is None else torch.where(active[..., None], slope, 0)

    @override
    def clean(self, x: Tensor, t: Time, *, active: Tensor | None = None) -> Tensor:
        query = self._at(x, t)
        ahead = self._parametrization.lookahead(as_time(t, x), self._stride()).float()
        if active is None:
            return self._evaluate_going(query, ahead)[1]
        rows, context = self._asked(active)
        chosen = Selection.of(self._streams.estimate, active, rows)
        return chosen.put(self._evaluate(chosen.query(query, context), chosen.take(ahead), chosen)[1])

    def read_out(self, x: Tensor, t: float) -> Logits:
        """Logits that yield the tokens, from the last evaluation; those of settled rows are what they settled with."""
        return self._evaluate_going(self._at(x, t), None)[0]

    def _at(self, x: Tensor, t: Time) -> Query:
        is_shared = not isinstance(t, Tensor) and (self._known is None or t in self._known)
        shared = float(t) if is_shared else None
        return self._query.replace(x=x.float(), t=as_time(t, x).float(), shared_time=shared, previous=self._previous)

    def _evaluate_going(self, query: Query, ahead: Tensor | None) -> tuple[Logits, Tensor]:
        """An evaluation of all rows but those that have settled, whose clean state is of no meaning from then on."""
        going = None if self._early_stop is None else self._early_stop.going
        if going is None or self._observer is not None or bool(going.all()):
            return self._evaluate(query, ahead, Selection(self._streams.estimate))
        going = going.to(query.t.device)
        rest = Selection.rest(self._streams.estimate, going, query.t.shape[1])
        query = rest.query(query, self._asked(going[:, None])[1])
        logits, clean = self._evaluate(query, None if ahead is None else rest.take(ahead), rest)
        return logits, clean if ahead is None else rest.put(clean)

    def _evaluate(self, query: Query, ahead: Tensor | None, random: Selection) -> tuple[Logits, Tensor]:
        """Logits, and the clean state at the temperature of `ahead`; the read-out moves no more and gets none."""
        if self._streams.repeat:
            self._streams.estimate.rewind()
        carried = [random.take(state) for state in self._carried]
        found = self._answer(Asked(query, ahead, carried, self._count), random)
        self._count += 1
        random.count(self.evaluations, None if self._early_stop is None else self._early_stop.going)
        if found.memory is not None:
            self._previous = random.keep(found.memory, self._previous)
        for number, state in enumerate(found.hidden):
            earlier = self._carried[number] if number < len(self._carried) else None
            self._carried[number : number + 1] = [random.keep(state, earlier)]
        for guidance, rows in found.unsound.items():
            unsound = random.spread(rows, False)
            self._unsound[guidance] = self._unsound.get(guidance, unsound) | unsound
        if found.tokens is None or self._early_stop is None:
            return found.logits, found.clean
        return self._early_stop.add(found.logits, found.tokens, is_last=ahead is None), found.clean

    def _answer(self, asked: Asked, random: Selection) -> Answered:
        """The network's answer and what follows from it; of this block it changes nothing but metrics."""
        query, ahead = asked.query, asked.ahead
        space = _Space(self, query.t if ahead is None else ahead, random, asked.count)
        network, unsound = _Network(self._diffusion, asked.carried), dict[int, Tensor]()
        answer, clean = self._predict(query, network, space, unsound)
        if self._observer is not None:
            self._observer(Evaluation(query.positions, query.t, query.x, answer.values, ahead is None))
        estimates, memory, tokens = [], [], []
        draws = Sliced(space.branch())
        for part, logits in answer.parts():
            if ahead is not None and clean is None:
                estimates.append(self._parametrization.estimate(logits, ahead[:, part], self._codebook, draws.of(part)))
            if ahead is not None and self._parametrization.uses_previous:
                whole = logits.shape == answer.values.shape
                memory.append(
                    logits if whole else self._parametrization.remember(logits, self._diffusion.backbone.table())
                )
            if self._early_stop is not None:
                tokens.append(top_token(logits))
        if clean is None:
            clean = _joined(estimates) if estimates else query.t.new_empty(0)
        remembered = _joined(memory) if memory else None
        return Answered(answer, clean, remembered, torch.cat(tokens, 1) if tokens else None, network.hidden, unsound)

    def _predict(
        self, query: Query, network: _Network, space: _Space, unsound: dict[int, Tensor]
    ) -> tuple[Logits, Tensor | None]:
        """The guided answer and what the guidance moves towards, if it says so.

        Without guidance or observer nobody needs the logits of more than a few positions at once.
        """
        size = self._diffusion.backbone.vocab_size
        # Of the whole block: what is kept of rows must not change its kind when others are left out.
        if not self._guidance and self._observer is None and self._token_count * size > CHUNK:
            return network.answer(query), None
        predict: Predict = network
        for guidance in self._guidance:
            predict = _Guided(predict, guidance, space, self, len(query.positions), unsound)
        prediction = predict(query)
        return Logits(prediction.logits, size), prediction.clean

    def check_guided(self, guidance: Guidance, query: Query, found: Any) -> Tensor:
        """Refuse a guided prediction of another shape or type; rows in which there is a NaN, (B',), bool."""
        rows = tuple(query.positions.shape)
        wanted = {"logits": (*rows, self._diffusion.backbone.vocab_size), "clean": (*rows, query.x.shape[-1])}
        for name, shape in wanted.items():
            value = getattr(found, name, None)
            if value is None and name == "clean":
                continue
            if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
                got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise PluginError(f"{described(guidance)} returned {name} of {got} instead of float {shape}.")
        # Looked at once a block, since asking the device would make the host wait at every evaluation.
        unsound: Tensor = found.logits.isnan().flatten(1).any(1)
        return unsound

    def check_sound(self, rows: Tensor | None = None) -> None:
        """Refuse guided logits that were NaN, in some rows or any, naming the innermost guidance that returned one."""
        for guidance in self._guidance:
            unsound = self._unsound.get(id(guidance))
            if unsound is not None and bool((unsound if rows is None else unsound[rows]).any()):
                raise PluginError(
                    f"{described(guidance)} returned logits that are NaN. Lower its scale; if they are NaN without it, "
                    "too, it is the model."
                )

    def _asked(self, active: Tensor) -> tuple[Tensor, Context]:
        """Rows with active tokens and their context, which is selected again only where the rows have changed."""
        rows = active.any(1).nonzero()[:, 0]
        if len(rows) == len(active):
            return rows, self._query.context
        if self._rows is None or not torch.equal(rows, self._rows):
            self._rows, self._context = rows, self._query.context.select(rows)
        return rows, self._context


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Space:
    """The state space at one evaluation, as guidance sees it."""

    def __init__(self, problem: TokenODE, ahead: Tensor, random: Selection, evaluation: int | None) -> None:
        self._problem, self._ahead, self._random, self._evaluation = problem, ahead, random, evaluation
        self._estimates = 0
        self._recorded: set[str] = set()

    @property
    def evaluation(self) -> int:
        if self._evaluation is None:
            raise NotAhead
        return self._evaluation

    @property
    def layout(self) -> Layout:
        layout = self._problem._layout
        if layout is None:
            raise NotAhead
        return Layout(self._random.rows(layout.tokens), self._random.rows(layout.blocks))

    def branch(self) -> Selection:
        # Streams per branch, so that what one branch draws does not depend on whether there is another.
        self._estimates += 1
        return self._random.branch(self._estimates - 1)

    def estimate(self, logits: Tensor) -> Tensor:
        problem = self._problem
        return problem._parametrization.estimate(logits, self._ahead, problem._codebook, self.branch())

    def encode(self, tokens: Tensor) -> Tensor:
        return self._problem._parametrization.encode(tokens, self._problem._diffusion.backbone.table())

    def random(self) -> Random:
        # Below the numbers of estimates, so that neither changes what the other draws.
        return self._random.branch(-1)

    def record(self, name: str, values: Tensor) -> None:
        if self._problem._layout is None:
            raise NotAhead
        if name not in self._recorded:
            self._recorded.add(name)
            self._problem.metrics.setdefault(name, []).append(self._random.spread(values.detach().float()))


class _Network:
    """The network at one evaluation; where it carries hidden states, each question goes on from an earlier answer.

    The n-th question of an evaluation goes on from the n-th of the one before, so that every branch of a guidance
    has a state of its own: `carried` are those of the evaluation before, `hidden` those of this one.
    """

    def __init__(self, diffusion: Diffusion, carried: list[Tensor]) -> None:
        self._diffusion, self._carried = diffusion, carried
        self.hidden: list[Tensor] = []

    def __call__(self, query: Query) -> Prediction:
        found: Prediction = self._diffusion(self._resumed([query])[0])
        self._keep([found.hidden])
        return found

    def together(self, queries: list[Query]) -> list[Prediction]:
        found = self._diffusion.together(self._resumed(queries))
        self._keep([one.hidden for one in found])
        return found

    def answer(self, query: Query) -> Logits:
        (query,) = self._resumed([query])
        features = self._diffusion.features(query)
        self._keep([features if self._diffusion.backbone.carries else None])
        return self._diffusion.answer_from(features, query)

    def _resumed(self, queries: list[Query]) -> list[Query]:
        if not self._carried:
            return queries
        asked = len(self.hidden)
        earlier = self._carried[asked : asked + len(queries)]
        # A branch that was not asked about before has no state yet.
        earlier = earlier + [torch.zeros_like(self._carried[0])] * (len(queries) - len(earlier))
        return [query.replace(carried=state) for query, state in zip(queries, earlier, strict=True)]

    def _keep(self, hidden: list[Tensor | None]) -> None:
        self.hidden += [state for state in hidden if state is not None]


@dataclass(frozen=True)
class _Guided:
    predict: Predict
    guidance: Guidance
    space: Space
    problem: TokenODE
    rows: int  # of the evaluation; a guidance may ask about others
    unsound: dict[int, Tensor]

    def __call__(self, query: Query) -> Prediction:
        found = self.guidance(self.predict, query, self.space)
        unsound, name = self.problem.check_guided(self.guidance, query, found), id(self.guidance)
        if len(unsound) != self.rows:
            unsound = unsound.any().expand(self.rows)
        self.unsound[name] = self.unsound.get(name, unsound) | unsound
        return found

    def together(self, queries: list[Query]) -> list[Prediction]:
        return [self(query) for query in queries]
