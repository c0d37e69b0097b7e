"""The equation x_t = alpha * clean + sigma * noise over a network, as training and sampling use it."""

import pytest
import torch
import toy_components as toys
from diffusion_models import SPACE, all_known, ask_everywhere, random_tokens, shared_lm

from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.types import Layout, Query
from l2d_plugins.schedules.linear import Linear


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.fixture
def query():
    return ask_everywhere(shared_lm(classes=("a", "b")), all_known(random_tokens(2, 7), padding=(0, 3)))


@pytest.mark.parametrize("time", [0.0, 0.3, 1.0])
def test_noisy_states_lie_between_noise_of_the_priors_scale_and_the_clean_state(time):
    model, tokens = shared_lm(), random_tokens(2, 5)
    t, noise = torch.full((2, 5), time), torch.randn(2, 5, SPACE["size"])
    clean = model.parametrization.encode(tokens, model.backbone.table())
    found = model.diffuse(tokens, t, noise)
    torch.testing.assert_close(found, time * clean + (1 - time) * SPACE["prior_scale"] * noise)


def test_own_weights_are_all_but_the_language_models():
    model = shared_lm(variant="full")
    own, lm = model.own_parameters(), {id(p) for p in model.backbone.lm.parameters()}
    assert all(weight.requires_grad and id(weight) not in lm for weight in own.values())
    everything = {id(p) for p in model.parameters()}
    assert {id(p) for p in own.values()} | lm == everything


def test_logits_come_in_single_precision():
    model = shared_lm()
    query = ask_everywhere(model, all_known(random_tokens(1, 4)))
    with torch.no_grad():
        assert model(query).logits.dtype == torch.float32
        assert model(query).clean is None


def test_queries_answered_together_are_answered_as_one_by_one(query):
    model = shared_lm(classes=("a", "b"))
    condition = torch.tensor([[0], [1]]).expand(2, 7)
    queries = [query.replace(condition=condition), query, query.replace(x=-query.x, condition=1 - condition)]
    with torch.no_grad():
        together = model.together(queries)
        for found, asked in zip(together, queries, strict=True):
            close(found.logits, model(asked).logits)
    assert (together[0].logits - together[1].logits).abs().max() > 0.1


def test_queries_of_different_times_may_be_answered_together(query):
    model = shared_lm(classes=("a", "b"))
    queries = [query.replace(t=torch.full_like(query.t, time), shared_time=time) for time in (0.25, 0.75)]
    with torch.no_grad():
        for found, asked in zip(model.together(queries), queries, strict=True):
            close(found.logits, model(asked).logits)


def test_queries_are_answered_together_by_a_network_whose_positions_see_each_other(tiny_lm):
    torch.manual_seed(0)
    network = toys.Canvas().build(tiny_lm())
    space = toys.Projected().build(network.vocab_size, network.hidden_size)
    model = DiffusionLM(Linear(), space, network, None)
    tokens = random_tokens(2, 6)
    blocks = torch.zeros_like(tokens)
    blocks[:, 3:] = 1
    query = Query(
        x=torch.randn(2, 3, 8),
        t=torch.full((2, 3), 0.5),
        positions=torch.arange(3, 6).expand(2, -1),
        context=network.read(Layout(tokens, blocks)),
        previous=torch.randn(2, 3, network.vocab_size),
    )
    queries = [query, query.replace(x=query.x.flip(-1), previous=-query.previous)]
    with torch.no_grad():
        for found, asked in zip(model.together(queries), queries, strict=True):
            close(found.logits, model(asked).logits)


def test_at_time_zero_the_diffusion_path_is_not_run(query, monkeypatch):
    model = shared_lm(classes=("a", "b"))
    monkeypatch.setattr(model.parametrization, "embed", None)
    with torch.no_grad():
        model(query.replace(t=torch.zeros_like(query.t), shared_time=0.0))
        with pytest.raises(TypeError):
            model(query)
