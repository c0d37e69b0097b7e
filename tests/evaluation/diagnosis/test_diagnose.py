"""Laws of the diagnosis: what is known of networks that are Bayes' rule by construction, and of every network."""

import math
from itertools import pairwise

import pytest
import torch
from bayes_networks import bayes_lm, rows_from
from diffusion_models import fresh_lm, random_tokens, shared_lm, shared_tess
from toy_components import Circle, Projected

from l2d_framework.diffusion.logits import dense
from l2d_framework.evaluation.diagnosis.curves import TokenLikelihood
from l2d_framework.evaluation.diagnosis.diagnose import NEGLIGIBLE, Settings, diagnose, time_grid, verdict
from l2d_framework.evaluation.diagnosis.report import draw, sentences, table
from l2d_framework.evaluation.statistics import Estimate, ratio
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.testing.toys import ToySchedule

FIRST, LATER = "over_combination", "over_combination_after_first_move"


def settings(model, *, times=12, adaptive=False, **options):
    chosen = model.sampling(**options)
    changes = {"solver": "fehlberg2", "num_inference_steps": None}
    return Settings(time_grid(model.schedule, times), chosen, model.sampling(**changes) if adaptive else None)


def rows_of(*lengths, known=3, seed=0):
    return [
        {
            "input_ids": random_tokens(1, length, seed=seed + number)[0].tolist(),
            "supervised": [False] * known + [True] * (length - known),
            "class_id": -1,
            "index": number,
        }
        for number, length in enumerate(lengths)
    ]


def curve(found, name):
    return [point[name]["value"] for point in found["cross_entropy"] if name in point]


@pytest.mark.parametrize("kind", ["embedding", "simplex", "projected"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_likelihood_is_that_of_the_gaussian_around_each_token(kind, t):
    model = {"embedding": shared_lm, "simplex": shared_tess, "projected": shared_lm}[kind]()
    if kind == "projected":
        space = Projected().build(model.backbone.vocab_size, model.backbone.hidden_size)
        model = DiffusionLM(Circle(), space, model.backbone)
    tokens = random_tokens(2, 3)
    noise = torch.randn(2, 3, model.parametrization.state_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = model.diffuse(tokens, torch.full(tokens.shape, t), noise)
        clean = dense(
            model.parametrization.encode(torch.arange(model.backbone.vocab_size)[None], model.backbone.table())
        )
        time = torch.tensor(t, dtype=torch.float64)
        scale = model.schedule.sigma(time) * model.parametrization.prior_scale
        distances = torch.cdist(dense(x).double(), model.schedule.alpha(time) * clean.double().expand(2, -1, -1))
        exact = -(distances**2) / (2 * scale**2)
        found = TokenLikelihood(model)(x, t)
    assert torch.allclose(found.double(), exact - exact[..., :1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("schedule", [ToySchedule(), Circle()])
@pytest.mark.parametrize(
    ("share", "first", "later"),
    [
        (lambda t: 0 * t, "does not gain", "does not gain"),  # the combination itself
        (lambda t: (t > 0).float(), "gains", "does not gain"),  # all that it knows more is there at once
        (lambda t: t, "gains", "gains"),  # it knows the more, the later
        (lambda t: -t, "does not gain", "does not gain"),  # it forgets
    ],
    ids=["combination", "jumps", "learns", "forgets"],
)
def test_a_network_gains_exactly_if_it_beats_the_combination(schedule, share, first, later):
    model = bayes_lm(schedule, share)
    rows = rows_from(model.backbone.better, 60, 9)
    found = diagnose(model, rows, settings(model), batch_size=16)
    assert (found["gain"][FIRST]["verdict"], found["gain"][LATER]["verdict"]) == (first, later)
    assert f"The network {first}" in sentences(found)[0] and f"The network {later}" in sentences(found)[1]


@pytest.mark.parametrize("schedule", [ToySchedule(), Circle()])
def test_the_combination_itself_has_its_own_cross_entropy(schedule):
    model = bayes_lm(schedule, lambda t: 0 * t)
    found = diagnose(model, rows_from(model.backbone.better, 20, 9), settings(model), batch_size=20)
    assert curve(found, "network") == pytest.approx(curve(found, "combination"), abs=1e-5)
    assert abs(found["gain"][FIRST]["value"]) < NEGLIGIBLE / 10


def test_a_skip_makes_an_untrained_network_the_combination_itself():
    model = fresh_lm(space={"bayes_skip": True})
    found = diagnose(model, rows_of(9, 7), settings(model), batch_size=2)
    assert curve(found, "network") == pytest.approx(curve(found, "combination"), abs=1e-4)
    assert curve(found, "network")[-1] < curve(found, "network")[0] - 1


def test_with_the_exact_prior_the_combination_never_loses_with_t():
    model = bayes_lm(ToySchedule(), lambda t: 0 * t, scale=1.0)
    prior = model.backbone.base
    rows = rows_from(prior, 400, 9)
    found = diagnose(model, rows, settings(model, times=24), batch_size=400)
    values = curve(found, "combination")
    error = found["cross_entropy"][0]["combination"]["standard_error"]
    assert all(after <= before + error / 4 for before, after in pairwise(values))
    assert values[-1] < 0.01 < values[0]
    entropies = -(prior.exp() * prior).sum(-1)
    expected = torch.stack([entropies[row["input_ids"][:-1]].mean() for row in rows]).mean()
    assert values[0] == pytest.approx(float(expected), abs=3 * error)


@pytest.mark.parametrize("make", [shared_lm, shared_tess])
def test_where_there_is_no_signal_both_curves_start_together(make):
    model = make()
    found = diagnose(model, rows_of(9, 6), settings(model, num_inference_steps=5), batch_size=2)
    first, second = found["cross_entropy"][:2]
    assert first["network"]["value"] == pytest.approx(first["combination"]["value"], abs=1e-5)
    assert second["network"]["value"] == pytest.approx(second["combination_after_first_move"]["value"], abs=1e-4)
    assert "combination_after_first_move" not in first


def test_at_t_zero_the_network_is_the_language_model():
    model, rows = shared_lm(), rows_of(8)
    found = diagnose(model, rows, settings(model, num_inference_steps=5), batch_size=1)
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model.backbone.lm(ids).logits[0, 2:-1], ids[0, 3:])
    assert found["cross_entropy"][0]["network"]["value"] == pytest.approx(float(losses), abs=1e-4)


@pytest.mark.parametrize("make", [shared_lm, shared_tess])
def test_batches_and_order_change_nothing(make, monkeypatch):
    model, rows = make(), rows_of(9, 5, 12, 7, 7)
    how = settings(model, num_inference_steps=5, adaptive=make is shared_lm)
    alone = diagnose(model, rows, how, batch_size=1)
    # A few positions at a time, too.
    monkeypatch.setattr("l2d_framework.diffusion.logits.CHUNK", 3 * model.backbone.vocab_size)
    for size, order in ((3, rows), (5, rows[::-1])):
        together = diagnose(model, order, how, batch_size=size)
        assert together["evaluations"] == alone["evaluations"]
        for name in ("network", "combination", "combination_after_first_move"):
            assert curve(together, name) == pytest.approx(curve(alone, name), abs=1e-4)
        for point, other in zip(together["settled"], alone["settled"], strict=True):
            assert point["share"]["value"] == pytest.approx(other["share"]["value"], abs=1e-9)
        for name in ("differs", "right", "base_right"):
            assert together["answers"][name]["value"] == pytest.approx(alone["answers"][name]["value"], abs=1e-9)


def test_tokens_settle_once_and_in_the_end_all_have():
    model = bayes_lm(ToySchedule(), lambda t: t)
    found = diagnose(model, rows_from(model.backbone.better, 30, 9), settings(model), batch_size=30)
    shares = [point["share"]["value"] for point in found["settled"]]
    assert len(shares) == 6 and shares == sorted(shares) and shares[-1] == 1.0
    assert 0 < found["answers"]["differs"]["value"] < 1


def test_a_network_that_learns_nothing_from_its_state_answers_as_the_base():
    model = bayes_lm(ToySchedule(), lambda t: 0 * t, scale=1e6)
    found = diagnose(model, rows_from(model.backbone.better, 30, 9), settings(model), batch_size=9)
    assert found["answers"]["differs"]["value"] == 0
    assert found["answers"]["right"] == found["answers"]["base_right"]
    assert {point["share"]["value"] for point in found["settled"]} == {1.0}


def test_evaluations_of_the_adaptive_solver_are_counted_token_by_token():
    model = shared_lm()
    found = diagnose(model, rows_of(9, 6), settings(model, num_inference_steps=5, adaptive=True), batch_size=2)
    spent = found["evaluations"]
    assert sum(spent["histogram"].values()) == found["tokens"] == 9
    assert spent["mean"] == pytest.approx(sum(n * count for n, count in spent["histogram"].items()) / 9)
    assert min(spent["histogram"]) <= spent["mean"] <= spent["p95"] <= max(spent["histogram"])


def test_a_spent_budget_costs_only_its_own_number(tmp_path):
    pytest.importorskip("matplotlib")
    model = shared_lm()
    how = settings(model, num_inference_steps=5)
    tight = model.sampling(solver={"name": "fehlberg2", "rtol": 1e-9, "atol": 1e-9}, num_inference_steps=6)
    found = diagnose(model, rows_of(9, 6), Settings(how.times, how.sampling, tight), batch_size=1)
    assert "6 evaluations" in found["evaluations"]["failed"]
    assert "6 evaluations" in sentences(found)[-1]
    draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_time_has_a_line_in_the_table():
    model = shared_lm()
    found = diagnose(model, rows_of(9, 6), settings(model, num_inference_steps=5), batch_size=2)
    assert len(table(found)) == 1 + len(found["cross_entropy"]) == 13
    assert {len(row) for row in table(found)} == {4}


def test_the_standard_error_is_that_of_rows_of_like_tokens():
    # Twenty tokens that are alike within a row are no more than one.
    sums, tokens = torch.tensor([20.0, 40.0, 60.0]), torch.tensor([20.0, 20.0, 20.0])
    found = ratio(sums.double(), tokens.double())
    assert found.value == pytest.approx(2.0)
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (0.1, 0.04, "gains"),
        (0.1, 0.06, "not clear"),
        (-0.1, 0.06, "not clear"),
        (-0.1, 0.04, "does not gain"),
        (1e-7, 1e-9, "does not gain"),
        (0.1, None, "not clear"),
    ],
)
def test_a_verdict_needs_two_standard_errors(value, error, said):
    assert verdict(Estimate(value, error, 10)) == said
