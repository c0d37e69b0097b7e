"""Laws of solvers."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from typing_extensions import override

from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.ode import Streams, TokenODE
from l2d_framework.diffusion.rng import categorical
from l2d_framework.errors import ConfigError, EvaluationBudgetError
from l2d_framework.parametrization import Parametrization
from l2d_framework.schedule import NoiseLaw, Schedule
from l2d_framework.solver import Problem, Solver, Time
from l2d_framework.testing.laws import Laws, distance, ensure, ensure_close
from l2d_framework.testing.toys import ToyPredict, ToyProblem, ToySchedule, ToySpace, toy_streams
from l2d_framework.types import Context, Query, Random, Stride

law = Laws()

_KEYS = torch.arange(6).view(2, 3)
_ALIKE = torch.zeros(1, 4, dtype=torch.int64)
_END = 0.9
_SIZE = 3
_UNEVEN = [0.0, 0.2, 0.3, 0.6, _END]
_REFERENCE_ERROR = 1e-9
"""Largest error of what is taken for the solution, at which nothing more can be said of an order."""


def _converges(solver: Solver) -> bool:
    return solver.gaussian_path and not (solver.is_adaptive or solver.is_stochastic)


@law.where(lambda solver: solver.gaussian_path)
def check_solver_reaches_a_constant(solver: Solver) -> None:
    """If the clean state never changes, the end of the path is the end of a straight line to it."""
    end = 0.99 if solver.evaluates_end else 1.0
    problem, x = ToyProblem(_constant, _KEYS), _start(_KEYS)
    reached = solver.solve(problem, x, problem.schedule.grid(7, end))
    clean = _constant(x, torch.tensor(end), _KEYS[..., None])
    expected = problem.schedule.interpolate(clean, x, torch.full(x.shape[:2], end))
    # A stochastic solver may miss by fresh noise of the end's level, an adaptive one by its tolerances.
    slack = 8 * (1 - end) * solver.is_stochastic + 1e-2 * solver.is_adaptive
    ensure_close(reached, expected, f"a constant clean state must be reached at t = {end}", tolerance=1e-3 + slack)


@law
def check_solver_is_repeatable(solver: Solver) -> None:
    """The same noise gives the same path, the start is left as it was, and no global generator is touched."""
    x = _start(_KEYS)
    given = x.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = _solve(solver, x, _KEYS)[0]
        ensure(torch.equal(torch.get_rng_state(), before), "solve draws from torch's global generator.")
    ensure(torch.equal(x, given), "solve changes the state it was given in place.")
    ensure(torch.equal(_solve(solver, x, _KEYS)[0], first), "The same start and noise gave another end.")


@law
def check_solver_times(solver: Solver) -> None:
    """No slope is asked for at t = 1, where it is singular, and nothing outside of 0 to 1."""
    for end in (_END,) if solver.evaluates_end else (_END, 1.0):
        _, problem = _solve(solver, _start(_KEYS), _KEYS, end=end)
        for t, is_slope in problem.visits:
            ensure(((t >= 0) & (t <= 1)).all(), f"The problem was asked at t = {t.tolist()}.")
            claim = f"A slope was asked for at t = 1 on the way to {end}; set evaluates_end."
            ensure(not is_slope or (t < 1).all(), claim)


@law.where(lambda solver: not solver.is_adaptive)
def check_solver_evaluation_count(solver: Solver) -> None:
    """A number of evaluations is hit exactly, read-out included, or refused with one that can be."""
    sizes = {wanted: size for wanted in range(1, 18) if (size := _grid_size(solver, wanted)) is not None}
    for wanted, size in sizes.items():
        used = _solve(solver, _start(_KEYS), _KEYS, count=size)[1].evaluations + 1
        claim = f"num_inference_steps={wanted} became a grid of {size} times and {used.unique().tolist()} evaluations."
        ensure((used == wanted).all(), claim)
    ensure(len(sizes) >= 2, "grid_size refuses nearly every number of evaluations from 1 to 17.")


@law.where(_converges)
def check_solver_order(solver: Solver) -> None:
    """Halving the step divides the error by 2 to the declared order at least, on straight paths and on bent ones.

    Measured where the logarithm of alpha / sigma is finite, since some methods step in it: not from t = 0, nor to 1.
    """
    times = (0.1, 0.8)
    for schedule in (ToySchedule(), _Bent()):
        x, true = _reference(schedule, *times)
        ends = []
        for steps in (32, 64):
            grid = torch.linspace(*times, steps + 1, dtype=x.dtype).tolist()
            ends.append(solver.solve(ToyProblem(_bump, _ALIKE, schedule), x.clone(), grid))
        coarse, fine = (float((reached - true).abs().max()) for reached in ends)
        measured = float(torch.tensor(coarse).div(fine).log2())
        ensure(
            measured > solver.order - 0.3 or fine < _REFERENCE_ERROR,
            f"Order {solver.order} is declared, {measured:.2f} measured on {schedule.name} paths: {coarse:.3g} off in "
            f"32 steps, {fine:.3g} in 64.",
        )


@law.where(_converges)
def check_solver_is_the_textbooks(solver: Solver) -> None:
    """Written out as sums of what is asked for by state and time alone, the method ends at the same place.

    So it does where tokens are drawn at a temperature that falls along the grid, of which no textbook knows. A method
    that is more than such sums, for instance one that limits its states, is not held to this.
    """
    once, twice = (_written_out(solver, _UNEVEN, scale) for scale in (1.0, 2.0))
    if not all(torch.allclose(2 * a[2], b[2]) for a, b in zip(once, twice, strict=True)):
        return
    *asked, _ = once

    class Textbook(Solver):
        stages: ClassVar[int] = len(asked) // (len(_UNEVEN) - 1)
        evaluates_end: ClassVar[bool] = any(abs(t - _END) < 1e-6 for _, t, _ in asked)

        name: Literal["textbook"] = "textbook"

        @override
        def step(self, problem: Problem, x: Tensor, t: float, s: float) -> Tensor:
            return self.solve(problem, x, [t, s])

        @override
        def solve(self, problem: Problem, x: Tensor, times: list[float]) -> Tensor:
            *asked, (_, _, end) = _written_out(solver, times)
            known = [x]
            for what, t, weights in asked:
                known.append(getattr(problem, what)(_sum(weights, known), t))
            return _sum(end, known)

    x = _start(_KEYS).double()
    reached, expected = (_annealed(_KEYS).solve(how, x, _UNEVEN) for how in (solver, Textbook()))
    claim = "the method as the textbook writes it must end there, too; see that `stages` and `evaluates_end` are true"
    ensure_close(reached, expected, claim)


@law.where(lambda solver: solver.is_adaptive and solver.gaussian_path)
def check_solver_accuracy(solver: Solver) -> None:
    """An adaptive solve of a smooth equation ends near its solution."""
    x, true = _reference(ToySchedule(), 0.0, 0.6)
    error = distance(_solve(solver, x.float(), _ALIKE, end=0.6)[0], true.float())
    ensure(error < 2e-2, f"The solution is missed by {error:.3g} of its size; choose stricter default tolerances.")


@law.where(lambda solver: solver.is_adaptive)
def check_solver_budget(solver: Solver) -> None:
    """No token costs more evaluations than the budget, read-out included; a solve that would is stopped."""
    keys = _KEYS + 200
    for budget in (20, 60):
        problem = ToyProblem(_bump, keys)
        with suppress(EvaluationBudgetError):
            solver.with_budget(budget).solve(problem, _start(keys), [0.0, _END])
        used = int(problem.evaluations.max()) + 1
        ensure(used <= budget, f"A token cost {used} evaluations with a budget of {budget}; override with_budget.")


@law.where(lambda solver: not solver.batch_coupled)
def check_solver_tokens_are_independent(solver: Solver) -> None:
    """A token's path and what it costs are the same alone and beside easier and harder ones."""
    x = _start(_KEYS)
    together, problem = _solve(solver, x, _KEYS)
    for row, column in product(range(2), range(3)):
        one = (slice(row, row + 1), slice(column, column + 1))
        alone, lonely = _solve(solver, x[one], _KEYS[one])
        ensure_close(together[one], alone, "a token's path must not depend on its batch mates; or set batch_coupled")
        here, there = int(problem.evaluations[one]), int(lonely.evaluations)
        ensure(here == there, f"A token costs {there} evaluations alone, {here} in a batch.")


def _constant(x: Tensor, t: Tensor, key: Tensor) -> Tensor:
    return (key + torch.arange(x.shape[-1]) - 3).to(x)


def _bump(x: Tensor, t: Tensor, key: Tensor) -> Tensor:
    # Sums, products and quotients are rounded alike in every batch shape, which sines and powers are not.
    sharpness = 2.0 + 4.0 * key
    return 3 / (1 + (sharpness * (t - 0.4)).square()) + 2 * x / (1 + x.square())


def _start(keys: Tensor) -> Tensor:
    return ToyProblem(_bump, keys + 1000).fresh_noise(torch.zeros(*keys.shape, _SIZE))


def _solve(solver: Solver, x: Tensor, keys: Tensor, *, count: int = 5, end: float = _END) -> tuple[Tensor, ToyProblem]:
    problem = ToyProblem(_bump, keys)
    return solver.solve(problem, x, [end * i / (count - 1) for i in range(count)] if count > 1 else [0.0]), problem


class _Probe(ToyProblem):
    """Answers each evaluation with a direction of its own, so that every state tells what it is made of."""

    def __init__(self, scale: float) -> None:
        super().__init__(_constant, _KEYS)
        self.directions = (scale * torch.eye(100, dtype=torch.float64))[:, None, None]
        self.asked: list[tuple[str, float, Tensor]] = []

    @override
    def _evaluate(self, x: Tensor, t: Time, active: Tensor | None, *, slope: bool) -> Tensor:
        time = float(torch.as_tensor(t).flatten()[0])
        self.asked.append(("velocity" if slope else "clean", time, x.clone()))
        return self.directions[len(self.asked)]

    @override
    def fresh_noise(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _written_out(solver: Solver, times: list[float], scale: float = 1.0) -> list[tuple[str, float, Tensor]]:
    """What is asked for, when, and the weights of start and earlier answers in the state there; the end comes last."""
    probe = _Probe(scale)
    end = solver.solve(probe, probe.directions[0].clone(), times)
    return [*probe.asked, ("", times[-1], end)]


def _sum(weights: Tensor, known: list[Tensor]) -> Tensor:
    return sum((w * value for w, value in zip(weights[0, 0].tolist(), known, strict=False) if w), torch.zeros(()))


class _Annealed(Parametrization):
    """Draws tokens at a temperature that falls along the grid, by all that is known of a move."""

    state_size = _SIZE
    prior_scale = 1.0

    @override
    def encode(self, tokens: Tensor, table: Tensor) -> Tensor:
        return table[tokens]

    @override
    def embed(self, x: Tensor, t: Tensor, schedule: NoiseLaw, table: Tensor, previous: Tensor | None) -> Tensor:
        return x

    @override
    def lookahead(self, t: Tensor, stride: Stride) -> Tensor:
        return t + stride.length / (1 if stride.evaluates_end else stride.stages)

    @override
    def estimate(self, logits: Tensor, t: Tensor, codebook: Tensor, random: Random) -> Tensor:
        return codebook[categorical((logits / (2.1 - 2 * t)[..., None]).softmax(-1), random.uniform())]


class _Net(ToyPredict):
    """As much of a model as an equation needs."""

    schedule = ToySchedule()
    backbone = SimpleNamespace(vocab_size=7)


def _annealed(keys: Tensor) -> TokenODE:
    space, zero = ToySpace(7, _SIZE), torch.zeros(keys.shape)
    return TokenODE(
        cast(Diffusion, _Net(7, _SIZE, 0)),
        Query(zero[..., None], zero, keys, cast(Context, None)),
        guidance=[],
        parametrization=_Annealed(),
        codebook=space.codebook,
        streams=Streams(toy_streams(keys), toy_streams(keys + 1000)),
    )


def _grid_size(solver: Solver, wanted: int) -> int | None:
    try:
        return solver.grid_size(wanted)
    except ConfigError as error:
        refusal = str(error)
    for neighbour in {int(number) for number in re.findall(r"\d+", refusal)} - {wanted, 0}:
        try:
            solver.grid_size(neighbour)
        except ConfigError:
            continue
        return None
    raise AssertionError(f"The refusal of num_inference_steps={wanted} names no number that works: {refusal}")


class _Bent(Schedule):
    """Paths that a method for straight ones leaves."""

    name: Literal["bent"] = "bent"

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return t.square()

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    @override
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * t, -torch.ones_like(t)


@cache
def _reference(schedule: Schedule, start: float, end: float) -> tuple[Tensor, Tensor]:
    """A state at `start` and where it ends, by 240 steps of the classical Runge-Kutta method in float64."""
    problem, h = ToyProblem(_bump, _ALIKE, schedule), (end - start) / 240
    x = first = _start(_ALIKE).double()
    for i in range(240):
        t = start + i * h
        k1 = problem.velocity(x, t)
        k2 = problem.velocity(x + h / 2 * k1, t + h / 2)
        k3 = problem.velocity(x + h / 2 * k2, t + h / 2)
        k4 = problem.velocity(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return first, x
