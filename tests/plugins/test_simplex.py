"""The simplex state space: its estimates, what the network reads of it, and that no size of pieces shows."""

import pytest
import torch
from diffusion_models import own_gradients, random_tokens, shared_tess, tess_lm, training_loss
from pydantic import ValidationError

from l2d_framework.diffusion import logits as chunks
from l2d_framework.diffusion import ode
from l2d_framework.diffusion.logits import dense
from l2d_framework.generation.prompts import pad_left
from l2d_framework.testing.toys import toy_streams
from l2d_framework.types import Layout
from l2d_plugins.parametrizations.simplex import SimplexConfig
from l2d_plugins.parametrizations.simplex.space import likeliest
from l2d_plugins.parametrizations.simplex.state import WideState
from l2d_plugins.schedules.cosine import Cosine

B, L, V, H = 2, 5, 11, 6
T = torch.zeros(B, L)
MIXES = ("mean", "sum", "max", "product", "none")
mixes = pytest.mark.parametrize("mix", MIXES)


def space(vocab_size=V, **fields):
    return SimplexConfig(**fields).build(vocab_size, H)


def keys(rows=B, length=L):
    return torch.arange(rows * length).view(rows, length)


def estimated(logits, **options):
    streams = toy_streams(keys(*logits.shape[:2]))
    return space(logits.shape[-1], estimate=options).estimate(logits, T, torch.empty(0), streams)


def table():
    return torch.randn(V, H, generator=torch.Generator().manual_seed(1))


def state():
    tokens = torch.randint(V, (B, L))
    return 0.6 * WideState.simplex(tokens, 5.0, V) + 2 * WideState.normal(keys(), V, torch.device("cpu"))


def drawn(estimate):
    return dense(estimate).argmax(-1)


class Numbers:
    """Random numbers without a stream per token, since there are many."""

    device = torch.device("cpu")

    def __init__(self, count):
        self._count, self._generator = count, torch.Generator().manual_seed(4)

    def uniform(self):
        return torch.rand(1, self._count, generator=self._generator)


def test_states_and_noise_hold_no_number_per_token_of_the_vocabulary():
    found = [space().encode(keys(), table()), space().noise(toy_streams(keys())), estimated(torch.randn(B, L, V))]
    assert all(isinstance(x, WideState) for x in found)


def test_a_token_is_k_at_its_place_and_minus_k_elsewhere():
    tokens = torch.randint(V, (B, L))
    found = dense(space(k=3.0).encode(tokens, table()))
    assert torch.equal(found, 6 * torch.nn.functional.one_hot(tokens, V) - 3.0)


def test_the_most_likely_token_is_its_own_estimate():
    logits = torch.randn(B, L, V)
    once = dense(estimated(logits))
    assert torch.equal(once.argmax(-1), logits.argmax(-1))
    assert torch.equal(dense(estimated(once)), once)


def test_the_average_is_the_expected_simplex():
    logits = torch.randn(B, L, V)
    everything = dense(space().encode(torch.arange(V)[None], table()))[0]
    wanted = (logits / 0.7).softmax(-1) @ everything
    torch.testing.assert_close(estimated(logits, mode="average", temperature=0.7), wanted)


def nucleus(logits, top_p):
    _, inside, order = likeliest(logits, top_p, logits.shape[-1])
    return torch.zeros_like(inside).scatter(-1, order, inside)


def brute_nucleus(logits, top_p):
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for row, mark in zip(logits.flatten(0, -2).double().softmax(-1), kept.view(-1, logits.shape[-1]), strict=True):
        before = 0.0
        for token in row.argsort(descending=True).tolist():
            mark[token] = before < top_p
            before += float(row[token])
    return kept


@pytest.mark.parametrize("top_p", [1e-3, 0.3, 0.9, 0.99])
def test_the_nucleus_is_the_smallest_set_of_likeliest_tokens_with_its_mass(top_p):
    logits = 2 * torch.randn(B, L, 60)
    kept = nucleus(logits, top_p)
    assert torch.equal(kept, brute_nucleus(logits, top_p))
    mass = torch.where(kept, logits.softmax(-1), 0)
    assert (mass.sum(-1) >= top_p - 1e-6).all()
    assert (mass.sum(-1) - mass.masked_fill(~kept, 2).amin(-1) < top_p).all()


def test_the_nucleus_of_all_mass_is_the_vocabulary_and_of_little_the_likeliest_token():
    logits = torch.randn(B, L, V) * 30
    assert nucleus(logits, 1.0).all()
    assert torch.equal(nucleus(logits, 1e-6), torch.nn.functional.one_hot(logits.argmax(-1), V).bool())


@pytest.mark.parametrize(("top_p", "temperature"), [(0.5, 1.0), (0.9, 0.6), (0.99, 1.5), (1.0, 1.0)])
@pytest.mark.parametrize(("size", "spread"), [(9, 1.0), (400, 1.0), (400, 0.01)])
def test_tokens_are_drawn_as_often_as_they_are_likely_within_the_nucleus(top_p, temperature, size, spread):
    count = 40000
    logits = spread * torch.randn(size)
    drawing = space(size, estimate={"mode": "nucleus", "top_p": top_p, "temperature": temperature})
    found = drawing.estimate(logits.expand(1, count, -1), T, torch.empty(0), Numbers(count))
    shares = torch.bincount(drawn(found).flatten(), minlength=size) / count
    scaled = logits / temperature
    wanted = torch.where(nucleus(scaled, top_p), scaled.softmax(-1), 0)
    wanted = wanted / wanted.sum()
    # Five standard errors.
    assert ((shares - wanted).abs() <= 5 * (wanted / count).sqrt() + 3 / count * (wanted > 0)).all()


@pytest.mark.parametrize(("spread", "is_wide"), [(0.0, True), (0.01, True), (1.0, None), (20.0, False)])
@pytest.mark.parametrize("top_p", [0.45, 0.99])
def test_a_token_of_the_whole_vocabulary_is_kept_if_it_is_in_the_nucleus_and_else_replaced_by_one_that_is(
    spread, is_wide, top_p
):
    logits = spread * torch.randn(4, 50, 700) + 1e-5 * torch.randn(4, 50, 700)
    kept = nucleus(logits, top_p)
    if is_wide is not None:
        # A flat distribution reaches far beyond the few tokens that are looked at first, a steep one never does.
        assert bool((kept.sum(-1) > 256).all()) == is_wide
    whole, found = (drawn(estimated(logits, mode="nucleus", top_p=p)) for p in (1.0, top_p))
    assert kept.gather(-1, found[..., None]).all()
    inside = kept.gather(-1, whole[..., None])[..., 0]
    assert inside.any()
    assert not inside.all() or spread == 20.0 or top_p == 0.99
    assert torch.equal(found[inside], whole[inside])


@mixes
@pytest.mark.parametrize("has_previous", [True, False])
def test_the_network_reads_the_embedding_expected_under_the_mixture(mix, has_previous):
    x, weights = state(), table()
    previous = torch.randn(B, L, V) if has_previous else None
    now = dense(x).softmax(-1)
    before = torch.full_like(now, 1 / V) if previous is None else previous.softmax(-1)
    wanted = {
        "mean": (now + before) / 2,
        "sum": now + before,
        "max": torch.maximum(now, before),
        "product": now * before,
        "none": now,
    }[mix]
    chosen = space(self_conditioning=mix)
    found = chosen.embed(x, T, Cosine(), weights, previous)
    torch.testing.assert_close(found, wanted @ weights)
    assert chosen.uses_previous == (mix != "none")


@mixes
@pytest.mark.parametrize("chunk", [1, 2 * V * B, 10**6])
@pytest.mark.parametrize("previous", ["none", "logits", "memory"])
def test_the_network_input_does_not_depend_on_the_size_of_pieces(monkeypatch, mix, chunk, previous):
    chosen, x, weights = space(self_conditioning=mix), state(), table()
    logits = torch.randn(B, L, V)
    given = {"none": None, "logits": logits, "memory": chosen.remember(logits, weights)}[previous]
    whole = chosen.embed(x, T, Cosine(), weights, given)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    torch.testing.assert_close(chosen.embed(x, T, Cosine(), weights, given), whole)


@mixes
@pytest.mark.parametrize("mode", ["argmax", "nucleus", "average"])
def test_generation_does_not_depend_on_the_size_of_pieces(monkeypatch, mix, mode):
    model = shared_tess(space=None) if mix == "mean" else tess_lm(space={"self_conditioning": mix})
    prompts = pad_left([random_tokens(1, 6)[0].tolist(), random_tokens(1, 4, seed=1)[0].tolist()])
    asked = []
    handle = model.backbone.lm.lm_head.register_forward_hook(lambda m, args, out: asked.append(tuple(out.shape[:2])))

    def generated():
        asked.clear()
        return model.generate(
            prompts, max_new_tokens=6, num_inference_steps=5, eos_token_id=None, estimate={"mode": mode}, patience=3
        )

    whole = generated()
    assert {length for _, length in asked} == {6}
    # `ode` asks whether pieces are needed at all.
    for module in (chunks, ode):
        monkeypatch.setattr(module, "CHUNK", 2 * 260 * 4)
    found = generated()
    handle.remove()
    # A row that is left when the other has settled may come in longer pieces.
    assert {(2, 4), (2, 2)} <= set(asked)
    assert all(rows * length <= 2 * 4 for rows, length in asked)
    assert torch.equal(found.sequences, whole.sequences)
    assert torch.equal(found.evaluations, whole.evaluations)


@mixes
@pytest.mark.parametrize("train_table", [False, True])
def test_gradients_reach_the_table_through_noisy_positions_only_if_asked_for(mix, train_table):
    weights = table().requires_grad_()
    found = space(self_conditioning=mix, train_table=train_table).embed(state(), T, Cosine(), weights, None)
    assert found.requires_grad == train_table


def test_a_trained_table_gets_the_gradient_of_the_expected_embedding():
    weights, x, logits = table().requires_grad_(), state(), torch.randn(B, L, V)
    found = space(train_table=True).embed(x, T, Cosine(), weights, logits)
    (slope,) = torch.autograd.grad(found.square().sum(), weights)
    plain = 0.5 * (dense(x).softmax(-1) + logits.softmax(-1)) @ weights
    (wanted,) = torch.autograd.grad(plain.square().sum(), weights)
    torch.testing.assert_close(slope, wanted)


@pytest.mark.parametrize("train_table", [False, True])
def test_training_on_noise_alone_moves_the_table_only_if_asked_for(train_table):
    model = tess_lm(space={"train_table": train_table})
    layout = Layout(random_tokens(2, 6), torch.ones(2, 6, dtype=torch.int64))
    gradients = own_gradients(model, training_loss(model, layout).total)
    slope = gradients["backbone.lm.model.embed_tokens.weight"]
    assert (slope is not None and bool(slope.any())) == train_table
    assert gradients["backbone.lm.lm_head.weight"].any()


@pytest.mark.parametrize("mix", ["mean", "sum"])
def test_only_expected_embeddings_are_remembered_where_the_mixture_is_linear(mix):
    logits = torch.randn(B, L, V)
    assert space(self_conditioning=mix).remember(logits, table()).shape == (B, L, H)
    narrow = space(H, self_conditioning=mix)
    assert narrow.remember(logits[..., :H], table()[:H]).shape == (B, L, H)
    assert torch.equal(narrow.remember(logits[..., :H], table()[:H]), logits[..., :H])


@pytest.mark.parametrize("mix", ["max", "product"])
def test_logits_are_remembered_where_the_mixture_is_not_linear(mix):
    logits = torch.randn(B, L, V)
    assert space(self_conditioning=mix).remember(logits, table()) is logits


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 0.0},
        {"self_conditioning": "median"},
        {"estimate": {"mode": "best"}},
        {"estimate": {"top_p": 0.0}},
        {"estimate": {"top_p": 1.1}},
        {"estimate": {"temperature": 0.0}},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SimplexConfig(**wrong)
