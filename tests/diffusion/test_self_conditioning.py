"""Self-conditioning: what training shows the network of a first prediction, and sampling of the evaluation before."""

import pytest
import torch
import toy_components as toys
from diffusion_models import random_tokens, shared_lm, shared_tess, tess_lm, training_loss
from tiny_models import tiny_lm

from l2d_framework.diffusion.logits import dense
from l2d_framework.diffusion.loss import denoising_loss
from l2d_framework.diffusion.training_noise import NoiseRule, draw
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.types import Layout
from l2d_plugins.schedules.linear import Linear

ROWS = 6
KEYS = [(0, 0, row) for row in range(ROWS)]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def ragged():
    """Texts with 2 to 5 tokens to learn, some of them followed by known ones or padding."""
    blocks = torch.zeros(ROWS, 8, dtype=torch.int64)
    for row in range(ROWS):
        blocks[row, 2 : 4 + row % 4] = 1
    blocks[1, 6:] = -1
    return Layout(random_tokens(ROWS, 8), blocks)


def drawn(model, layout, share, **rule):
    return draw(model, layout, NoiseRule(**{"keys": KEYS[: len(layout.tokens)], "self_conditioning": share, **rule}))


def losses(model, layout, share, **rule):
    return training_loss(model, layout, self_conditioning=share, **rule)


class Watched(DiffusionLM):
    """Keeps every query."""

    @classmethod
    def of(cls, model):
        watched = cls(model.schedule, model.parametrization, model.backbone, model.block_size)
        watched.queries, watched.origin = [], model.origin
        return watched

    def features(self, query):
        self.queries.append(query)
        return super().features(query)


def test_mixed_precision_frees_gradients_layer_by_layer_though_there_was_a_first_prediction():
    model, layout, seen = tess_lm(), ragged(), []
    first, last = model.backbone.lm.model.layers[0], model.backbone.lm.model.layers[-1]
    last.mlp.down_proj.weight.register_post_accumulate_grad_hook(lambda _: seen.append("last layer's weight"))

    def watch(module, args, out):
        if out.requires_grad:
            out.register_hook(lambda _: seen.append("first layer"))

    first.register_forward_hook(watch)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        total = denoising_loss(model, layout, drawn(model, layout, 1.0)).total
    total.backward()
    assert seen == ["last layer's weight", "first layer"]


def test_examples_are_conditioned_at_the_given_rate_and_others_learn_as_without():
    model, layout = shared_tess(), ragged()
    conditioned = drawn(model, layout, 0.5).conditioned
    assert conditioned.any()
    assert not conditioned.all()
    none, half, whole = (losses(model, layout, share) for share in (0.0, 0.5, 1.0))
    shown = conditioned[half.row]
    torch.testing.assert_close(half.tokens[~shown], none.tokens[~shown])
    torch.testing.assert_close(half.tokens[shown], whole.tokens[shown])
    assert (half.tokens[shown] - none.tokens[shown]).abs().max() > 1e-3


def test_the_rate_is_that_of_examples():
    layout = Layout(torch.zeros(1000, 2, dtype=torch.int64), torch.tensor([[0, 1]]).expand(1000, -1))
    keys = [(0, row) for row in range(1000)]
    for share in (0.0, 0.3, 1.0):
        found = float(drawn(shared_tess(), layout, share, keys=keys).conditioned.float().mean())
        assert found == pytest.approx(share, abs=0.05 if share == 0.3 else 0)


def test_the_rate_changes_neither_times_nor_noise():
    model, layout = shared_tess(), ragged()
    first, other = drawn(model, layout, 0.0), drawn(model, layout, 0.5)
    for name in ("positions", "t", "noise", "kept", "first_t"):
        assert torch.equal(dense(getattr(first, name)), dense(getattr(other, name))), name


@pytest.mark.parametrize("options", [{}, {"space": {"self_conditioning": "max"}}, {"classes": ("a", "b")}])
def test_an_example_loses_what_it_loses_alone(options):
    model, layout = tess_lm(**options), ragged()
    classes = torch.tensor([0, 1, -1, 0, 1, 1]) if "classes" in options else None
    together = losses(model, layout, 0.5, classes=classes, class_dropout=0.3)
    for row in range(ROWS):
        length = int(layout.present[row].sum())
        part = Layout(layout.tokens[row : row + 1, :length], layout.blocks[row : row + 1, :length])
        alone = losses(
            model,
            part,
            0.5,
            keys=[KEYS[row]],
            classes=None if classes is None else classes[row : row + 1],
            class_dropout=0.3,
        )
        torch.testing.assert_close(together.tokens[together.row == row], alone.tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_first_noisier", [True, False])
def test_the_first_prediction_is_of_the_same_noise_at_a_noisier_time_in_training_and_the_same_in_evaluation(
    is_first_noisier,
):
    model, layout = Watched.of(shared_tess()), ragged()
    draws = drawn(model, layout, 0.5, is_first_noisier=is_first_noisier)
    rows = draws.conditioned.nonzero()[:, 0]
    denoising_loss(model, layout, draws)
    first, second = model.queries
    assert first.previous is None
    wanted = model.schedule.noisier(draws.t) if is_first_noisier else draws.t
    assert torch.equal(first.t, wanted[rows])
    assert (wanted <= draws.t).all()
    assert bool((wanted < draws.t).any()) == is_first_noisier
    targets = layout.tokens.gather(1, draws.positions)
    for query, t, chosen in ((first, wanted, rows), (second, draws.t, torch.arange(ROWS))):
        assert torch.equal(query.positions, draws.positions[chosen])
        torch.testing.assert_close(dense(query.x), dense(model.diffuse(targets, t, draws.noise))[chosen])
    assert torch.equal(second.t, draws.t)
    logits = model(first).logits
    memory = model.parametrization.remember(logits, model.backbone.table())
    torch.testing.assert_close(second.previous[rows], memory)
    nothing = model.parametrization.remember(torch.zeros_like(logits[:1]), model.backbone.table())
    others = (~draws.conditioned).nonzero()[:, 0]
    torch.testing.assert_close(second.previous[others], nothing.expand(len(others), -1, -1))


def test_one_pass_is_enough_where_no_example_is_conditioned():
    model, layout = Watched.of(shared_tess()), ragged()
    denoising_loss(model, layout, drawn(model, layout, 0.0))
    assert len(model.queries) == 1
    assert model.queries[0].previous is None


def test_no_gradient_flows_through_the_first_prediction():
    model, layout = Watched.of(shared_tess()), ragged()
    with torch.enable_grad():
        denoising_loss(model, layout, drawn(model, layout, 1.0))
    assert not model.queries[1].previous.requires_grad


def test_what_is_remembered_of_a_prediction_trains_like_its_logits(monkeypatch):
    model, layout = tess_lm(), ragged()
    found = losses(model, layout, 0.5)
    asked = []
    monkeypatch.setattr(type(model.parametrization), "remember", lambda self, logits, table: asked.append(1) or logits)
    torch.testing.assert_close(losses(model, layout, 0.5).tokens, found.tokens, rtol=1e-4, atol=1e-4)
    assert asked


def test_a_space_that_reads_no_previous_prediction_is_never_shown_one():
    for model in (shared_lm(), tess_lm(space={"self_conditioning": "none"})):
        model, layout = Watched.of(model), ragged()
        draws = drawn(model, layout, 1.0)
        assert not draws.conditioned.any()
        denoising_loss(model, layout, draws)
        assert len(model.queries) == 1


def toy():
    """A state space and a network of third parties."""
    torch.manual_seed(0)
    network = toys.Canvas().build(tiny_lm())
    space = toys.Projected().build(network.vocab_size, network.hidden_size)
    model = DiffusionLM(Linear(), space, network, None)
    model.origin = shared_tess().origin
    return model


@pytest.mark.parametrize("make", [shared_tess, toy])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "renoise"])
def test_every_evaluation_is_shown_the_logits_of_the_one_before(make, solver):
    model, seen = Watched.of(make()), []
    steps = 5
    options = {"solver": solver, "num_inference_steps": steps, "estimate": {}, "block_size": None}
    model.generate(random_tokens(2, 4), max_new_tokens=3, eos_token_id=None, observer=seen.append, **options)
    assert len(model.queries) == len(seen) == steps
    assert model.queries[0].previous is None
    for query, before in zip(model.queries[1:], seen, strict=False):
        assert torch.equal(query.previous, before.logits)


def test_a_new_block_forgets_the_evaluations_of_the_last():
    model = Watched.of(shared_tess())
    model.generate(random_tokens(1, 4), max_new_tokens=4, eos_token_id=None, block_size=2, num_inference_steps=3)
    assert [query.previous is None for query in model.queries] == [True, False, False] * 2


def test_the_previous_prediction_matters_in_sampling():
    prompts = random_tokens(3, 5)
    options = {"max_new_tokens": 6, "eos_token_id": None, "num_inference_steps": 4}
    seen = [[], []]
    for mix, kept in zip(("mean", "none"), seen, strict=True):
        tess_lm(space={"self_conditioning": mix}).generate(prompts, observer=kept.append, **options)
    assert not torch.allclose(seen[0][-1].logits, seen[1][-1].logits, atol=1e-2)
