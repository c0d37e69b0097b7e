"""The state space of L2D: where tokens lie, what the network sees of a state, and how logits become a clean state."""

import math

import pytest
import torch
from diffusion_models import diffusion_lm, fresh_lm, own_gradients, random_tokens, supervised, training_loss
from pydantic import ValidationError
from torch.distributions import Independent, Normal
from torch.nn import functional

from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.errors import ConfigError
from l2d_plugins.parametrizations import l2d_components
from l2d_plugins.parametrizations.embedding import (
    ConstantTemperature,
    EmbeddingConfig,
    EmbeddingEstimate,
    PolynomialTemperature,
)
from l2d_plugins.schedules.linear import Linear

V, H, D, SIGMA = 11, 6, 8, 16.0


class Numbers:
    """Random numbers that a test has chosen."""

    def __init__(self, numbers):
        self.numbers = numbers

    def uniform(self):
        return self.numbers


@pytest.fixture
def table():
    return torch.randn(V, H)


def space(**estimate):
    torch.manual_seed(1)
    config = EmbeddingConfig(size=D, hidden=12, prior_scale=SIGMA, estimate=EmbeddingEstimate(**estimate))
    return config.build(V, H)


def at_temperature(value, mode, **estimate):
    return space(mode=mode, temperature=ConstantTemperature(value=value), **estimate)


def times(rows=3, length=4, value=0.5):
    return torch.full((rows, length), value)


def test_the_spaces_are_offered_under_their_names():
    assert {component.component_name() for component in l2d_components()} == {"embedding", "simplex"}


def test_every_token_has_norm_sqrt_of_the_width(table):
    torch.testing.assert_close(space().codebook(table).norm(dim=-1), torch.full((V,), math.sqrt(D)))


def test_a_token_lies_in_the_direction_of_its_projected_embedding(table):
    state_space, tokens = space(), torch.randint(V, (2, 3))
    with torch.no_grad():
        found = state_space.encode(tokens, table)
        direction = state_space.vocabulary(table[tokens])
        assert torch.allclose(functional.cosine_similarity(found, direction, dim=-1), torch.ones(2, 3))
        torch.testing.assert_close(found, state_space.codebook(table)[tokens])


def test_gradients_reach_the_projection_and_not_the_table(table):
    state_space = space()
    table.requires_grad_(True)
    state_space.encode(torch.tensor([[1, 2]]), table.detach())[..., 0].sum().backward()
    assert state_space.vocabulary.weight.grad.any()
    assert state_space.vocabulary.bias.grad.any()


def test_states_are_computed_in_single_precision_whatever_the_weights(table):
    assert space().bfloat16().codebook(table.bfloat16()).dtype == torch.float32
    wanted = space().codebook(table)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(space().codebook(table), wanted)


@pytest.mark.parametrize("time", [0.0, 0.3, 0.9, 1.0])
def test_the_network_sees_states_of_unit_variance_at_every_time(table, time, monkeypatch):
    state_space, seen = space(), []
    monkeypatch.setattr(state_space.translation, "forward", lambda y: seen.append(y) or y)
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    clean = state_space.codebook(torch.randn(count, H, generator=generator)).detach()[None]
    noise = SIGMA * torch.randn(1, count, D, generator=generator)
    t = torch.full((1, count), time)
    state_space.embed(Linear().interpolate(clean, noise, t), t, Linear(), table, None)
    assert float(seen[0].square().mean()) == pytest.approx(1.0, abs=0.02)


def test_the_network_input_is_a_two_layer_map_of_the_state(table):
    state_space, x, t = space(), torch.randn(2, 3, D), times(2, 3, 1.0)
    first, _, last = state_space.translation
    with torch.no_grad():
        torch.testing.assert_close(state_space.embed(x, t, Linear(), table, None), last(functional.silu(first(x))))


def test_weights_start_xavier_uniform_and_biases_zero():
    for name, weight in space().named_parameters():
        if name.endswith("bias"):
            assert not weight.any()
        else:
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.8 * bound < float(weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("t", [0.0, 0.5, 0.99])
def test_a_skip_adds_the_likelihood_of_the_state_under_each_token(table, t):
    skipping = EmbeddingConfig(size=D, prior_scale=SIGMA, bayes_skip=True).build(V, H)
    codebook, logits = skipping.codebook(table).detach(), torch.randn(3, 4, V)
    x = t * codebook[torch.randint(V, (3, 4))] + (1 - t) * SIGMA * torch.randn(3, 4, D)
    likelihoods = Independent(Normal(t * codebook.double(), (1 - t) * SIGMA), 1).log_prob(x[..., None, :].double())
    found = skipping.refine(logits, x, times(value=t), Linear(), codebook)
    torch.testing.assert_close(found.softmax(-1).double(), (logits + likelihoods).softmax(-1), atol=1e-5, rtol=1e-4)


def test_a_skip_follows_weights_that_change_without_a_trace():
    model, layout = diffusion_lm(space={"bayes_skip": True}), supervised(random_tokens(2, 8))
    training_loss(model, layout)
    with torch.no_grad():
        model.parametrization.vocabulary.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    found = training_loss(model, layout).total
    model.forget_codebook()
    assert torch.equal(found, training_loss(model, layout).total)


@pytest.mark.parametrize("mode", ["sample", "average", "argmax"])
def test_at_temperature_zero_all_modes_take_the_most_likely_token(table, mode):
    state_space, logits = at_temperature(0.0, mode), torch.randn(3, 4, V)
    codebook = state_space.codebook(table)
    found = state_space.estimate(logits, times(), codebook, Numbers(torch.rand(3, 4)))
    assert torch.equal(found, codebook[logits.argmax(-1)])


@pytest.mark.parametrize("mode", ["sample", "average"])
def test_an_annealed_temperature_ends_at_the_most_likely_token(table, mode):
    state_space, logits = space(mode=mode), torch.randn(3, 4, V)
    codebook = state_space.codebook(table)
    found = state_space.estimate(logits, times(value=1.0), codebook, Numbers(torch.rand(3, 4)))
    torch.testing.assert_close(found, codebook[logits.argmax(-1)])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_an_average_is_weighted_with_the_tempered_probabilities(table, temperature):
    state_space, logits = at_temperature(temperature, "average"), torch.randn(3, 4, V)
    codebook = state_space.codebook(table)
    found = state_space.estimate(logits, times(), codebook, Numbers(None))
    torch.testing.assert_close(found, (logits / temperature).softmax(-1) @ codebook)


def test_a_renormalised_average_has_the_norm_of_a_token_and_the_same_direction(table):
    logits = torch.randn(3, 4, V)
    codebook = space().codebook(table)
    plain = at_temperature(1.0, "average").estimate(logits, times(), codebook, Numbers(None))
    found = at_temperature(1.0, "average", renormalize=True).estimate(logits, times(), codebook, Numbers(None))
    torch.testing.assert_close(found.norm(dim=-1), torch.full((3, 4), math.sqrt(D)))
    torch.testing.assert_close(functional.cosine_similarity(found, plain, dim=-1), torch.ones(3, 4))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_follow_the_tempered_probabilities(table, temperature):
    state_space, logits = at_temperature(temperature, "sample"), torch.randn(V)
    codebook, count = state_space.codebook(table), 20_000
    numbers = Numbers((torch.arange(count)[None] + 0.5) / count)
    found = state_space.estimate(logits.expand(1, count, -1), times(1, count), codebook, numbers)
    share = (found[0, :, None] == codebook).all(-1).float().mean(0)
    torch.testing.assert_close(share, (logits / temperature).softmax(-1), rtol=0, atol=2e-4)


def test_one_number_per_token_is_drawn(table):
    state_space = at_temperature(1.0, "sample")
    codebook, logits = state_space.codebook(table), torch.randn(2, 3, V)
    keys = [[(row, column) for column in range(3)] for row in range(2)]
    streams, same = (TokenStreams(keys, torch.device("cpu")) for _ in range(2))
    for _ in range(2):
        found = state_space.estimate(logits, times(2, 3), codebook, streams)
        assert torch.equal(found, state_space.estimate(logits, times(2, 3), codebook, Numbers(same.uniform())))


def test_huge_logits_do_not_overflow(table):
    logits = torch.randn(3, 4, V) * 1e30
    for mode in ("sample", "average"):
        state_space = at_temperature(1e-3, mode)
        found = state_space.estimate(logits, times(), state_space.codebook(table), Numbers(torch.rand(3, 4)))
        assert torch.equal(found, state_space.codebook(table)[logits.argmax(-1)])


def test_the_linear_temperature_falls_from_one_to_zero():
    t = torch.linspace(0, 1, 5)
    torch.testing.assert_close(PolynomialTemperature()(t), 1 - t)


@pytest.mark.parametrize(("power", "end"), [(2.0, 1.0), (1.0, 0.5), (3.0, 0.8)])
def test_a_polynomial_temperature_is_zero_from_its_end_on(power, end):
    temperature = PolynomialTemperature(power=power, end=end)
    t = torch.linspace(0, 1, 21)
    values = temperature(t)
    assert float(values[0]) == 1
    assert not values[t >= end].any()
    assert (values.diff()[t[1:] < end] < 0).all()
    torch.testing.assert_close(temperature(torch.tensor(end / 2)), torch.tensor(0.5**power))


def test_estimates_can_be_changed_for_a_request_while_the_weights_stay_shared():
    state_space = space()
    other = state_space.with_estimate({"mode": "average", "temperature": {"power": 2.0}})
    assert other.config.estimate == EmbeddingEstimate(mode="average", temperature=PolynomialTemperature(power=2.0))
    assert state_space.config.estimate == EmbeddingEstimate()
    assert all(a is b for a, b in zip(other.parameters(), state_space.parameters(), strict=True))
    assert state_space.with_estimate({}) is state_space


def test_naming_another_temperature_leaves_the_old_ones_fields_behind():
    other = space().with_estimate({"temperature": {"name": "constant"}})
    assert other.config.estimate.temperature == ConstantTemperature(value=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mean"}, "mode: Input should be 'sample', 'argmax' or 'average'"),
        ({"temperature": {"name": "constant", "value": -1.0}}, "value: .*greater than or equal to 0"),
        ({"temperature": {"name": "cosine"}}, "temperature: .*'cosine'"),
        ({"temperature": 0.5}, "temperature"),
        ({"renormalise": True}, "renormalise: Extra inputs are not permitted"),
    ],
)
def test_estimate_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        space().with_estimate(options)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"prior_scale": 0.0}, {"hidden": -1}, {"size": 2.5}, {"width": 3}])
def test_sizes_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        EmbeddingConfig(**wrong)


def test_a_previous_prediction_through_a_map_of_zeros_changes_nothing_and_the_map_learns():
    plain, shown = fresh_lm(), fresh_lm(space={"self_conditioning": "add"})
    own, weights = shown.own_parameters(), plain.own_parameters()
    assert [name for name in own if name not in weights] == ["parametrization.previous"]
    assert all(torch.equal(own[name], weight) for name, weight in weights.items())
    model, layout = diffusion_lm(space={"self_conditioning": "add"}), supervised(random_tokens(3, 7))
    own = model.own_parameters()
    own["parametrization.previous"].data.zero_()
    gradient = own_gradients(model, training_loss(model, layout, self_conditioning=1.0).total)
    assert gradient["parametrization.previous"].abs().max() > 0
    without = diffusion_lm()
    for name, weight in without.own_parameters().items():
        weight.data.copy_(own[name].data)
    with torch.no_grad():
        found, wanted = (training_loss(one, layout, self_conditioning=1.0) for one in (model, without))
    assert torch.equal(found.tokens, wanted.tokens)
