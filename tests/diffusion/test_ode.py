"""What a solver may ask: clean states, slopes, noise; and what it costs, token by token."""

from typing import ClassVar, Literal

import pytest
import torch
import toy_components as toys
from diffusion_models import SPACE, all_known, diffusion_lm, random_tokens, shared_lm
from torch import nn

from l2d_framework.diffusion.ode import Streams, TokenODE
from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.diffusion.sampler import Block, Sampler
from l2d_framework.guidance import Guidance
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.registry import registry
from l2d_framework.solver import Solver
from l2d_framework.types import Prediction, Query
from l2d_plugins.guidance.classifier_free import ClassifierFree
from l2d_plugins.parametrizations.embedding import Embedding
from l2d_plugins.schedules.linear import Linear

ROWS, LENGTH, WIDTH = 3, 6, 4


def streams(rows=range(ROWS), **options):
    keys = [[(row, column, "x") for column in range(WIDTH)] for row in rows]
    return Streams(*(TokenStreams(keys, torch.device("cpu")) for _ in range(2)), **options)


def problem(model=None, *, estimate=None, guidance=(), observer=None, condition=None, draws=None):
    """Positions 2 to 5 of a text that is known as a whole."""
    model = shared_lm(classes=("a", "b")) if model is None else model
    space = model.parametrization.with_estimate(estimate or {})
    query = Query(
        x=torch.zeros(ROWS, WIDTH, 1),
        t=torch.zeros(ROWS, WIDTH),
        positions=torch.arange(2, 2 + WIDTH).expand(ROWS, -1),
        context=model.backbone.read(all_known(random_tokens(ROWS, LENGTH), padding=(0, 1, 0))),
        condition=condition,
    )
    return TokenODE(
        model,
        query,
        guidance=list(guidance),
        parametrization=space,
        codebook=space.codebook(model.backbone.table()),
        streams=draws or streams(),
        observer=observer,
    )


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SPACE["prior_scale"] * torch.randn(ROWS, WIDTH, SPACE["size"], generator=generator, dtype=torch.float64)


AVERAGE = {"mode": "average"}
SOME = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_the_slope_leads_to_the_clean_state():
    asked, x = problem(estimate=AVERAGE), state()
    clean = asked.clean(x, 0.25)
    torch.testing.assert_close(asked.velocity(x, 0.25), (clean - x) / 0.75)


def test_slopes_keep_the_precision_of_the_state():
    assert problem(estimate=AVERAGE).velocity(state(), 0.25).dtype == torch.float64


def test_a_time_per_token_means_what_the_same_time_for_all_means():
    x = state()
    shared = problem(estimate=AVERAGE).clean(x, 0.25)
    torch.testing.assert_close(problem(estimate=AVERAGE).clean(x, torch.full((ROWS, WIDTH), 0.25)), shared)


def solver(name, **fields):
    return registry().create("solver", {"name": name, **fields})


THIRDS = [0, 1 / 6, 1 / 3, 0.5, 0.5, 0.625, 0.75, 0.875]
STEP = [0.5] * 4 + [0.375] * 4
LOOKAHEAD = [
    (solver("euler"), [0.5, 0.875]),
    (solver("renoise"), [0.5, 0.875]),
    (solver("midpoint"), [0.25, 0.5, 0.6875, 0.875]),
    (solver("heun"), [0.5, 1, 0.875, 1]),
    (solver("rk4"), [min(t + h, 1) for t, h in zip(THIRDS, STEP, strict=True)]),
    (solver("torchdiffeq_fixed", method="heun3"), [0.5, 2 / 3, 5 / 6, 0.875, 1, 1]),
]
"""Times whose temperatures the released code takes on the grid 0, 0.5, 0.875."""


def read_times(solver, grid, monkeypatch, lookahead="released"):
    """Where the temperatures of a solve are read, and when its evaluations are."""
    times, asked = [], []
    real = Embedding.estimate
    monkeypatch.setattr(Embedding, "estimate", lambda *a: times.append(a[2]) or real(*a))
    observed = problem(estimate={"lookahead": lookahead}, observer=lambda e: asked.append(e.t))
    observed.solve(solver, state(), grid)
    return times, asked


@pytest.mark.parametrize(("solver", "wanted"), LOOKAHEAD, ids=[s.name for s, _ in LOOKAHEAD])
def test_temperatures_are_those_of_the_released_code(solver, wanted, monkeypatch):
    if solver.missing_requirements():
        pytest.skip("torchdiffeq is not installed")
    times, _ = read_times(solver, [0.0, 0.5, 0.875], monkeypatch)
    torch.testing.assert_close(torch.stack(times), torch.tensor(wanted).float()[:, None, None].expand(-1, ROWS, WIDTH))


def test_a_sampled_block_has_the_temperatures_of_its_grid(monkeypatch):
    model, times = shared_lm(), []
    real = Embedding.estimate
    monkeypatch.setattr(Embedding, "estimate", lambda *a: times.append(float(a[2][0, 0])) or real(*a))
    layout = all_known(random_tokens(ROWS, LENGTH))
    positions = torch.arange(2, 2 + WIDTH).expand(ROWS, -1)
    keys = [[(row, column) for column in range(WIDTH)] for row in range(ROWS)]
    sampling = model.sampling(solver=solver("midpoint"), num_inference_steps=5)
    Sampler.of(model, sampling)(Block(positions, layout, model.backbone.read(layout), keys))
    assert times == [0.25, 0.5, 0.75, 1.0]


ITSELF = [(solver(name), "paper") for name in ("midpoint", "rk4")] + [(solver("bosh3", rtol=2.0, atol=2.0), "released")]


@pytest.mark.parametrize(("solver", "lookahead"), ITSELF, ids=["midpoint", "rk4", "bosh3"])
def test_the_papers_temperatures_and_those_of_adaptive_solvers_are_of_the_time_itself(solver, lookahead, monkeypatch):
    times, asked = read_times(solver, [0.0, 0.5, 0.875], monkeypatch, lookahead)
    assert len(times) > 3
    assert all(torch.equal(*pair) for pair in zip(times, asked, strict=True))


class Textbook(Solver):
    """Knows a state, a time and a slope; nothing of temperatures."""

    name: Literal["textbook"] = "textbook"


class TextbookEuler(Textbook):
    def step(self, problem, x, t, s):
        return x + (s - t) * problem.velocity(x, t)


class TextbookMidpoint(Textbook):
    stages: ClassVar[int] = 2

    def step(self, problem, x, t, s):
        h = s - t
        return x + h * problem.velocity(x + h / 2 * problem.velocity(x, t), t + h / 2)


class TextbookHeun(Textbook):
    stages: ClassVar[int] = 2
    evaluates_end: ClassVar[bool] = True

    def step(self, problem, x, t, s):
        k1 = problem.velocity(x, t)
        return x + (s - t) / 2 * (k1 + problem.velocity(x + (s - t) * k1, s))


class TextbookRK4(Textbook):
    stages: ClassVar[int] = 4
    evaluates_end: ClassVar[bool] = True

    def step(self, problem, x, t, s):
        h = s - t
        k1 = problem.velocity(x, t)
        k2 = problem.velocity(x + h * k1 / 3, t + h / 3)
        k3 = problem.velocity(x + h * (k2 - k1 / 3), t + 2 * h / 3)
        k4 = problem.velocity(x + h * (k1 - k2 + k3), s)
        return x + h * (k1 + 3 * (k2 + k3) + k4) / 8


@pytest.mark.parametrize("mode", ["sample", "average"])
@pytest.mark.parametrize("book", [TextbookEuler, TextbookMidpoint, TextbookHeun, TextbookRK4])
def test_a_solver_written_from_the_textbook_gives_the_built_ins_result_at_annealed_temperatures(book, mode):
    estimate = {"mode": mode, "temperature": {"name": "polynomial"}}
    name, grid = book.__name__.removeprefix("Textbook").lower(), [0.0, 0.2, 0.3, 0.7, 0.9]
    ends = [problem(estimate=estimate).solve(how, state(), grid) for how in (book(), solver(name))]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6 if name == "rk4" else 0)
    without = problem(estimate={**estimate, "lookahead": "paper"}).solve(book(), state(), grid)
    assert not torch.allclose(ends[0], without)


@pytest.mark.parametrize("estimate", [AVERAGE, {"mode": "sample"}])
def test_some_tokens_are_answered_as_among_all_and_the_others_with_zero(estimate):
    x, t = state(), torch.rand(ROWS, WIDTH)
    whole, part = problem(estimate=estimate).velocity(x, t), problem(estimate=estimate).velocity(x, t, active=SOME)
    torch.testing.assert_close(part[SOME], whole[SOME], rtol=0, atol=1e-4)
    assert not part[~SOME].any()


def test_tokens_that_are_not_active_are_left_out_of_the_network():
    sizes = []
    asked = problem(observer=lambda e: sizes.append((tuple(e.logits.shape[:2]), e.positions.tolist())))
    asked.clean(state(), 0.5, active=SOME)
    asked.clean(state(), 0.5)
    assert sizes[0][0] == (2, 3)
    assert sizes[0][1][0] == [2, 4, 5]
    assert sizes[0][1][1][0] == 3
    assert sizes[1][0] == (ROWS, WIDTH)


def test_every_evaluation_is_counted_for_the_tokens_it_is_about():
    asked, x = problem(), state()
    asked.clean(x, 0.0)
    asked.velocity(x, 0.5, active=SOME)
    asked.velocity(x, torch.full((ROWS, WIDTH), 0.5), active=SOME)
    asked.read_out(x, 1.0)
    assert torch.equal(asked.evaluations, 2 + 2 * SOME.long())


def test_a_guidance_of_two_branches_counts_as_one_evaluation():
    condition = torch.zeros(ROWS, WIDTH, dtype=torch.int64)
    asked = problem(guidance=[ClassifierFree(scale=2.0)], condition=condition)
    asked.velocity(state(), 0.5)
    assert (asked.evaluations == 1).all()


def test_inactive_tokens_keep_their_place_in_their_random_stream():
    x, sample = state(), {"mode": "sample", "temperature": {"name": "constant", "value": 3.0}}
    first, second = problem(estimate=sample), problem(estimate=sample)
    wanted = [first.clean(x, 0.5) for _ in range(2)]
    second.clean(x, 0.5, active=SOME)
    found = second.clean(x, 0.5)
    torch.testing.assert_close(found[SOME], wanted[1][SOME], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[~SOME], wanted[0][~SOME], rtol=0, atol=1e-4)
    assert not torch.allclose(wanted[0], wanted[1])


def test_repeated_draws_make_the_slope_a_function_of_state_and_time():
    sample = {"mode": "sample", "temperature": {"name": "constant", "value": 3.0}}
    asked, x = problem(estimate=sample, draws=streams(repeat=True)), state()
    first = asked.velocity(x, 0.5)
    asked.velocity(x, 0.25, active=SOME)
    assert torch.equal(asked.velocity(x, 0.5), first)


def test_fresh_noise_has_the_priors_scale_and_is_new_each_time():
    asked, x = problem(), state()
    first, second = asked.fresh_noise(x), asked.fresh_noise(x)
    wanted = TokenStreams([[(row, column, "x") for column in range(WIDTH)] for row in range(ROWS)], torch.device("cpu"))
    assert torch.equal(first, SPACE["prior_scale"] * wanted.normal(SPACE["size"]))
    assert not torch.equal(first, second)


def test_the_observer_sees_guided_logits_and_the_read_out_last():
    seen = []
    asked = problem(guidance=[toys.Sharpen(scale=1.0)], observer=seen.append)
    x = state()
    asked.velocity(x, 0.5)
    logits = asked.read_out(x, 0.75).values
    assert [e.is_read_out for e in seen] == [False, True]
    assert torch.equal(seen[1].logits, logits)
    assert torch.equal(seen[1].t, torch.full((ROWS, WIDTH), 0.75))
    torch.testing.assert_close(logits, 2 * problem().read_out(x, 0.75).values)


class Add(Guidance):
    name: Literal["add"] = "add"

    def __call__(self, predict, query, space):
        return Prediction(predict(query).logits + self.scale)


def test_the_first_guidance_is_innermost():
    x, plain = state(), problem().read_out(state(), 0.5).values
    found = problem(guidance=[Add(scale=1.0), toys.Sharpen(scale=1.0)]).read_out(x, 0.5).values
    torch.testing.assert_close(found, 2 * (plain + 1))
    found = problem(guidance=[toys.Sharpen(scale=1.0), Add(scale=1.0)]).read_out(x, 0.5).values
    torch.testing.assert_close(found, 2 * plain + 1)


class Towards(Guidance):
    """Moves towards one token whatever the network says."""

    name: Literal["towards"] = "towards"

    def __call__(self, predict, query, space):
        return Prediction(predict(query).logits, space.encode(torch.full_like(query.positions, 7)))


def test_a_clean_state_that_guidance_chose_is_the_one_moved_to():
    model = shared_lm(classes=("a", "b"))
    seven = model.parametrization.encode(torch.full((ROWS, WIDTH), 7), model.backbone.table())
    assert torch.equal(problem(guidance=[Towards()]).clean(state(), 0.5), seven)


@pytest.fixture
def self_conditioned(tiny_lm):
    torch.manual_seed(0)
    network = toys.Beside().build(tiny_lm())
    nn.init.normal_(network.gate, std=0.1)
    space = toys.Projected().build(network.vocab_size, network.hidden_size)
    return DiffusionLM(Linear(), space, network)


def test_self_conditioning_hands_each_token_its_own_previous_logits(self_conditioned, monkeypatch):
    given = []
    real = self_conditioned.parametrization.embed

    def embed(x, t, schedule, table, previous):
        given.append(previous)
        return real(x, t, schedule, table, previous)

    monkeypatch.setattr(self_conditioned.parametrization, "embed", embed)
    seen = []
    asked, x = problem(self_conditioned, observer=seen.append), state()
    asked.clean(x, 0.5)
    asked.clean(x, 0.5, active=SOME)
    asked.clean(x, 0.5)
    assert given[0] is None
    torch.testing.assert_close(given[1][0], seen[0].logits[0, SOME[0]])
    expected = seen[0].logits.clone()
    expected[0, SOME[0]], expected[2, 1] = seen[1].logits[0], seen[1].logits[1, 0]
    torch.testing.assert_close(given[2], expected)


def test_without_self_conditioning_no_logits_are_kept(monkeypatch):
    model, given = diffusion_lm(), []
    real = model.parametrization.embed
    monkeypatch.setattr(model.parametrization, "embed", lambda *a: given.append(a[-1]) or real(*a))
    asked = problem(model)
    asked.clean(state(), 0.5)
    asked.clean(state(), 0.75)
    assert given == [None, None]
