"""The small worlds in which components are tested: a schedule, an equation, a network and a state space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.schedule import Schedule
from l2d_framework.solver import Problem, Time, as_time
from l2d_framework.types import Layout, Prediction, Query

CleanLaw = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Clean state of (x, t, key), elementwise in tokens: (B, L, D), (B, L, 1) and (B, L, 1) to (B, L, D)."""


class ToySchedule(Schedule):
    """Straight paths, x_t = t * clean + (1 - t) * noise."""

    name: Literal["toy-linear"] = "toy-linear"

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return t

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t


def toy_streams(keys: Tensor) -> TokenStreams:
    """Random numbers of tokens named by integers, (B, L); equal names give equal numbers."""
    return TokenStreams([[("toy", key) for key in row] for row in keys.tolist()], keys.device)


class ToyProblem(Problem):
    """An equation with a known clean state, which depends, as noise does, on the names (B, L), int64, of the tokens."""

    schedule: Schedule = ToySchedule()

    def __init__(self, law: CleanLaw, keys: Tensor, schedule: Schedule | None = None) -> None:
        self.keys = keys
        if schedule is not None:
            self.schedule = schedule
        # How often each token was evaluated, and of every call the times asked for and whether it was for a slope.
        self.evaluations = torch.zeros_like(keys)
        self.visits: list[tuple[Tensor, bool]] = []
        self._law, self._streams = law, toy_streams(keys)

    @override
    def clean(self, x: Tensor, t: Time, *, active: Tensor | None = None) -> Tensor:
        return self._evaluate(x, t, active, slope=False)

    @override
    def velocity(self, x: Tensor, t: Time, *, active: Tensor | None = None) -> Tensor:
        return self._evaluate(x, t, active, slope=True)

    @override
    def fresh_noise(self, x: Tensor) -> Tensor:
        return self._streams.normal(x.shape[-1]).to(x)

    def _evaluate(self, x: Tensor, t: Time, active: Tensor | None, *, slope: bool) -> Tensor:
        time = as_time(t, x)
        active = torch.ones_like(self.keys, dtype=torch.bool) if active is None else active
        self.evaluations = self.evaluations + active
        self.visits.append((time[active], slope))
        exact = time.to(x) if isinstance(t, Tensor) else torch.full_like(time, t, dtype=x.dtype)
        out = self._law(x, exact[..., None], self.keys[..., None])
        if slope:
            out = self.schedule.velocity(x, out, exact)
        return torch.where(active[..., None], out, 0.0)


class ToySpace:
    """A state space of random directions, deterministic so that guided and plain predictions can be compared."""

    evaluation = 0

    def __init__(self, vocab_size: int, state_size: int, rows: int = 1, length: int = 3) -> None:
        generator = torch.Generator().manual_seed(1)
        self.codebook = torch.randn(vocab_size, state_size, generator=generator)
        tokens = (torch.arange(7) % vocab_size).expand(rows, -1)
        self.layout = Layout(tokens, torch.zeros_like(tokens))
        self.recorded: dict[str, Tensor] = {}
        self._streams = toy_streams(torch.arange(length).expand(rows, -1))

    def random(self) -> TokenStreams:
        """Streams that are alike in every row."""
        return self._streams

    def record(self, name: str, values: Tensor) -> None:
        """Note a number per row."""
        self.recorded[name] = values

    def estimate(self, logits: Tensor) -> Tensor:
        """Average of the codebook, (B, L, D)."""
        return logits.softmax(-1) @ self.codebook

    def encode(self, tokens: Tensor) -> Tensor:
        """Clean states of tokens."""
        return self.codebook[tokens]


class ToyPredict:
    """A network of one matrix whose logits depend on state, time, position and class, token by token."""

    def __init__(self, vocab_size: int, state_size: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self._weight = torch.randn(state_size, vocab_size, generator=generator)
        self._classes = torch.randn(classes + 1, vocab_size, generator=generator)
        # Every tensor of logits handed out, with a copy made at that time.
        self.given: list[tuple[Tensor, Tensor]] = []

    def __call__(self, query: Query) -> Prediction:
        """Answer one query; class -1 and no class at all are the same."""
        condition = torch.full_like(query.positions, -1) if query.condition is None else query.condition
        place = query.t + query.positions
        # Products and sums of fixed order: a token's logits must not depend on the shape of the batch it is in.
        logits = (query.x[..., None] * self._weight).sum(-2) + place[..., None].sin() + self._classes[condition]
        self.given.append((logits, logits.clone()))
        return Prediction(logits)

    def together(self, queries: list[Query]) -> list[Prediction]:
        """Answer several queries about the same positions."""
        first = queries[0]
        if any(q.context is not first.context or not torch.equal(q.positions, first.positions) for q in queries):
            raise ValueError("Queries asked together must share positions and context; change another field.")
        return [self(query) for query in queries]


class ToyGuided(ToyPredict):
    """The same network inside a guidance that has already chosen the clean state."""

    def __call__(self, query: Query) -> Prediction:
        """Answer one query."""
        return Prediction(super().__call__(query).logits, query.x + 1)
