"""The denoising loss: what is drawn for an example, and what becomes of it."""

import sys
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
import toy_components as toys
from diffusion_models import (
    PROVEN,
    SPACE,
    ask_everywhere,
    diffusion_lm,
    own_gradients,
    random_tokens,
    shared_lm,
    supervised,
    training_loss,
)
from torch import nn
from torch.nn import functional

from l2d_framework.diffusion import loss
from l2d_framework.diffusion.loss import chunked_cross_entropy, denoising_loss
from l2d_framework.diffusion.training_noise import NoiseRule, draw
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.shapes import Shape
from l2d_framework.types import Layout
from l2d_plugins.schedules.linear import Linear

KEYS = [(0, 0, 0), (0, 0, 1), (0, 0, 2)]


def ragged():
    """Three texts padded on the right, with prompts and answers of different lengths."""
    blocks = torch.tensor(
        [
            [0, 0, 0, 1, 2, 3, 4, 5, 6],
            [0, 0, 1, 2, 0, 0, 3, -1, -1],
            [0, 1, -1, -1, -1, -1, -1, -1, -1],
        ]
    )
    return Layout(random_tokens(*blocks.shape), blocks)


def row_of(layout, row, length=None):
    return Layout(layout.tokens[row : row + 1, :length], layout.blocks[row : row + 1, :length])


def drawn(layout, **rule):
    return draw(shared_lm(), layout, NoiseRule(**{"keys": KEYS[: len(layout.tokens)], **rule}))


def close(found, wanted, tolerance=1e-4):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_every_supervised_position_is_drawn_once_and_no_other():
    draws = drawn(ragged())
    for row, blocks in enumerate(ragged().blocks):
        assert draws.positions[row][draws.valid[row]].tolist() == (blocks >= 1).nonzero()[:, 0].tolist()


def test_slots_that_only_fill_up_a_row_are_ones_the_network_could_answer_for():
    draws = drawn(ragged())
    assert (ragged().blocks.gather(1, draws.positions) >= 1).all()


@pytest.mark.parametrize("copies", [1, 3])
def test_draws_of_an_example_depend_on_its_key_alone(copies):
    layout, together = ragged(), drawn(ragged(), draws=copies)
    for row in range(3):
        # Alone, without padding.
        length = int(layout.present[row].sum())
        alone = drawn(row_of(layout, row, length), keys=[KEYS[row]], draws=copies)
        valid = together.valid[row]
        for name in ("positions", "t", "noise", "kept"):
            assert torch.equal(getattr(together, name)[row][valid], getattr(alone, name)[0]), name


def test_another_key_draws_other_times_and_noise():
    layout = row_of(ragged(), 0)
    first = drawn(layout)
    for key in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        other = drawn(layout, keys=[key])
        assert not (first.t == other.t).any()
        assert not torch.equal(first.noise, other.noise)


def test_global_generators_have_no_say():
    torch.manual_seed(1)
    first = drawn(ragged())
    torch.manual_seed(2)
    assert torch.equal(drawn(ragged()).noise, first.noise)


def test_tokens_of_one_block_share_their_time_and_not_their_noise():
    layout = Layout(random_tokens(1, 9), torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3, 3]]))
    t = drawn(layout).t[0].tolist()
    assert t[0] == t[1] == t[2]
    assert t[3] == t[4]
    assert len(set(t)) == 3
    assert len(drawn(layout).noise[0].unique(dim=0)) == 7


def test_each_draw_of_a_token_has_its_own_time_and_noise():
    draws = drawn(row_of(ragged(), 0), draws=4)
    assert draws.positions[0].tolist() == [3, 4, 5, 6, 7, 8] * 4
    assert len(draws.t[0].unique()) == 24
    assert len(draws.noise[0].unique(dim=0)) == 24


def test_times_are_those_of_the_schedule_and_noise_is_normal():
    layout = Layout(torch.zeros(1, 4000, dtype=torch.int64), torch.arange(4000)[None])
    draws = drawn(layout)
    assert float(draws.t.mean()) == pytest.approx(0.5, abs=0.02)
    assert 0 <= float(draws.t.min()) < float(draws.t.max()) < 1
    assert float(draws.noise.std()) == pytest.approx(1, abs=0.02)
    model = shared_lm()
    late = DiffusionLM(Linear(minimum_noise=0.5), model.parametrization, model.backbone)
    assert torch.equal(draw(late, layout, NoiseRule(KEYS[:1])).t, draws.t / 2)


@pytest.mark.parametrize("per", ["token", "example"])
def test_class_labels_are_dropped_at_the_given_rate(per):
    layout = Layout(torch.zeros(400, 12, dtype=torch.int64), torch.arange(12).expand(400, -1))
    draws = drawn(layout, keys=[(0, i) for i in range(400)], class_dropout=0.3, dropout_per=per)
    assert float(draws.kept.float().mean()) == pytest.approx(0.7, abs=0.06 if per == "example" else 0.02)
    agree = (draws.kept == draws.kept[:, :1]).all(1)
    assert agree.all() if per == "example" else agree.float().mean() < 0.1


def test_no_label_is_dropped_at_rate_zero_and_every_one_at_rate_one():
    assert drawn(ragged()).kept.all()
    assert not drawn(ragged(), class_dropout=1.0).kept[drawn(ragged()).valid].any()


def test_a_dropped_label_is_no_label():
    model, layout, classes = shared_lm(classes=("a", "b")), ragged(), torch.tensor([0, 1, 0])
    with torch.no_grad():
        without = training_loss(model, layout)
        dropped = training_loss(model, layout, classes=classes, class_dropout=1.0)
        none = training_loss(model, layout, classes=torch.full_like(classes, -1))
        kept = training_loss(model, layout, classes=classes)
    assert torch.equal(dropped.tokens, without.tokens)
    assert torch.equal(none.tokens, without.tokens)
    assert not torch.allclose(kept.tokens, without.tokens, atol=1e-2)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_the_path_at_supervised_positions_alone_gives_the_loss_and_gradients_of_the_whole_text(family, variant):
    model, layout = diffusion_lm(family, variant=variant, classes=("a", "b")), ragged()
    classes = torch.tensor([1, -1, 0])
    losses = training_loss(model, layout, classes=classes)
    found = own_gradients(model, losses.total)
    draws = draw(model, layout, NoiseRule(KEYS))
    rows, places = draws.valid.nonzero().T
    slots = draws.positions[rows, places]
    # Everywhere else stands a state that nobody asks about.
    query = ask_everywhere(model, layout)
    x, t = query.x.clone(), query.t.clone()
    targets = layout.tokens.gather(1, draws.positions)
    x[rows, slots - 1] = model.diffuse(targets, draws.t, draws.noise)[rows, places]
    t[rows, slots - 1] = draws.t[rows, places]
    logits = model(query.replace(x=x, t=t, condition=classes[:, None].expand_as(t))).logits
    total = functional.cross_entropy(logits[rows, slots - 1], targets[rows, places], reduction="sum")
    wanted = own_gradients(model, total)
    close(losses.total, total)
    assert losses.count == len(rows)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-4, name


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_an_example_loses_what_it_loses_alone(family):
    model, layout = shared_lm(family), ragged()
    with torch.no_grad():
        together = training_loss(model, layout)
        rows = drawn(layout).valid.nonzero()[:, 0]
        for row in range(3):
            part = row_of(layout, row, int(layout.present[row].sum()))
            alone = training_loss(model, part, keys=[KEYS[row]])
            close(together.tokens[rows == row], alone.tokens)


def test_the_loss_of_several_draws_is_their_mean():
    model, layout = shared_lm(), ragged()
    with torch.no_grad():
        losses = training_loss(model, layout, draws=3)
    assert losses.count == 10
    assert len(losses.tokens) == len(losses.t) == 30
    close(losses.total, losses.tokens.sum() / 3)


def test_the_total_is_the_sum_over_tokens_and_times_are_reported_beside():
    model, layout = shared_lm(), ragged()
    losses = training_loss(model, layout)
    draws = drawn(layout)
    close(losses.total.detach(), losses.tokens.sum())
    assert torch.equal(losses.t, draws.t[draws.valid])
    assert not losses.tokens.requires_grad


def test_the_loss_of_a_fresh_model_is_the_language_models():
    from diffusion_models import fresh_lm

    model, layout = fresh_lm(), ragged()
    with torch.no_grad():
        losses = training_loss(model, layout)
        logits = model.backbone.lm(layout.tokens).logits
    rows, slots = (layout.blocks >= 1).nonzero().T
    close(
        losses.tokens, functional.cross_entropy(logits[rows, slots - 1], layout.tokens[rows, slots], reduction="none")
    )


def test_blocks_of_several_tokens_are_learnt_from_tokens_before_them(tiny_lm):
    torch.manual_seed(0)
    network = toys.Canvas().build(tiny_lm())
    space = toys.Projected().build(network.vocab_size, network.hidden_size)
    model = DiffusionLM(Linear(), space, network, None)
    layout = Layout(random_tokens(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]]))
    losses = training_loss(model, layout)
    assert losses.count == 4
    assert len(losses.t.unique()) == 1


@pytest.fixture
def head():
    return nn.Linear(6, 50)


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_cross_entropy_in_chunks_is_plain_cross_entropy_with_its_gradients(head, chunk):
    features, targets = torch.randn(11, 6, requires_grad=True), torch.randint(50, (11,))
    plain = functional.cross_entropy(head(features), targets, reduction="none")
    wanted = torch.autograd.grad(3 * plain.sum(), [features, *head.parameters()])
    total, losses = chunked_cross_entropy(head, features, targets, chunk=chunk)
    close(losses, plain.detach())
    found = torch.autograd.grad(3 * total, [features, *head.parameters()])
    for one, other in zip(found, wanted, strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_weights_and_refined_logits_count_in_the_sum_and_its_gradients_whatever_the_chunk(head, chunk):
    features, targets = torch.randn(11, 6, requires_grad=True), torch.randint(50, (11,))
    weights, added = torch.rand(11), torch.randn(11, 50)
    plain = functional.cross_entropy(head(features) + added, targets, reduction="none")
    wanted = torch.autograd.grad(3 * (weights * plain).sum(), [features, *head.parameters()])
    options = {"chunk": chunk, "weights": weights, "refine": lambda logits, part: logits + added[part]}
    total, losses = chunked_cross_entropy(head, features, targets, **options)
    close(losses, plain.detach())
    found = torch.autograd.grad(3 * total, [features, *head.parameters()])
    for one, other in zip(found, wanted, strict=True):
        close(one, other, 1e-5)
    with torch.no_grad():
        close(chunked_cross_entropy(head, features, targets, **options)[0], total)


def written_over(logits, target, weight, ignore_index, z, smoothing, reduction, softcap, return_z_loss):
    """What liger-kernel's function of that name does with these arguments."""
    assert (weight, z, smoothing, softcap, return_z_loss) == (None, 0, 0, None, False) and logits.requires_grad
    losses = functional.cross_entropy(logits.detach(), target, ignore_index=ignore_index, reduction=reduction)
    logits.data = logits.detach().softmax(-1) - functional.one_hot(target, logits.shape[-1])
    return losses, None, None, logits


def stand_in(monkeypatch, function):
    module = ModuleType("liger_kernel.ops.cross_entropy")
    module.cross_entropy_forward = function
    for name in ("liger_kernel", "liger_kernel.ops", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["stand-in", "liger-kernel"])
def fused_kernel(request, monkeypatch):
    if request.param == "liger-kernel":
        pytest.importorskip("liger_kernel")
    else:
        stand_in(monkeypatch, written_over)
    monkeypatch.setattr(loss, "_has_kernel", lambda logits: True)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_fused_kernel_gives_the_losses_and_gradients_of_the_plain_way(head, weighted, fused_kernel, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head.to(device)
    features, targets = torch.randn(11, 6, device=device, requires_grad=True), torch.randint(50, (11,), device=device)
    options = {"chunk": 4, "weights": torch.rand(11, device=device) if weighted else None}

    def found():
        total, losses = chunked_cross_entropy(head, features, targets, **options)
        return [total.detach(), losses, *torch.autograd.grad(3 * total, [features, *head.parameters()])]

    fused = found()
    monkeypatch.setattr(loss, "_has_kernel", lambda logits: False)
    for one, other in zip(fused, found(), strict=True):
        close(one, other, 1e-5)


def test_no_kernel_is_asked_on_a_cpu_or_about_shapes_without_numbers(monkeypatch):
    monkeypatch.setattr(loss, "find_spec", lambda name: "installed")
    shape = Shape(torch.empty(2, 3, device="meta"), torch.device("cuda"))
    assert shape.is_cuda
    assert not loss._has_kernel(shape) and not loss._has_kernel(torch.empty(2, 3))


@pytest.mark.parametrize(
    ("function", "warning"),
    [
        (written_over, None),
        (lambda logits, target, *_: (logits.sum(-1), logits), "it differs from what torch computes"),
        (lambda logits, target: None, "TypeError: .*arguments"),
    ],
)
def test_a_kernel_that_is_another_or_wrong_is_said_and_not_used(function, warning, monkeypatch):
    monkeypatch.setattr(loss, "find_spec", lambda name: "installed")
    stand_in(monkeypatch, function)
    is_right = loss._is_right.__wrapped__
    with nullcontext() if warning is None else pytest.warns(UserWarning, match=f"cross-entropy is not used.*{warning}"):
        assert is_right(torch.device("cpu")) == (warning is None)
    monkeypatch.setattr(loss, "find_spec", lambda name: None)
    assert not is_right(torch.device("cpu"))


def test_a_head_that_needs_logits_which_a_kernel_has_written_over_is_refused(fused_kernel):
    class Capped(nn.Module):
        def forward(self, features):
            return torch.tanh(features)

    features = torch.randn(3, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        chunked_cross_entropy(Capped(), features, torch.tensor([1, 0, 5]), chunk=4)


class Late(Linear):
    def weight(self, t):
        return 2 * t


def test_each_tokens_cross_entropy_is_weighted_by_the_schedule_and_reported_beside():
    model, layout = shared_lm(), ragged()
    late = DiffusionLM(Late(), model.parametrization, model.backbone)
    with torch.no_grad():
        plain, weighted = training_loss(model, layout, draws=2), training_loss(late, layout, draws=2)
    assert plain.tokens is plain.cross_entropies
    assert torch.equal(weighted.cross_entropies, plain.tokens)
    assert torch.equal(weighted.tokens, 2 * weighted.t * plain.tokens)
    close(weighted.total, weighted.tokens.sum() / 2)


@pytest.mark.parametrize("gradients", [True, False])
def test_no_more_logits_than_a_chunk_are_made_at_once(head, gradients):
    sizes = []
    features, targets = torch.randn(11, 6, requires_grad=gradients), torch.randint(50, (11,))
    with torch.set_grad_enabled(gradients):
        head.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[1]))
        chunked_cross_entropy(head, features, targets, chunk=4)
    assert sizes == [4, 4, 3]


def test_no_logits_are_kept_for_the_backward_pass(head):
    features, targets = torch.randn(11, 6, requires_grad=True), torch.randint(50, (11,))
    total, _ = chunked_cross_entropy(head, features, targets, chunk=11)
    kept = [tuple(saved.shape) for saved in total.grad_fn.saved_tensors]
    assert kept == [(11, 6), *(tuple(weight.shape) for weight in head.parameters())]


def test_the_size_of_the_chunk_does_not_change_a_gradient():
    found = []
    for chunk in (1, 3, 1024):
        model, layout = diffusion_lm(), supervised(random_tokens(2, 8))
        draws = draw(model, layout, NoiseRule(KEYS[:2]))
        found.append(own_gradients(model, denoising_loss(model, layout, draws, chunk=chunk).total))
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert (other[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name


def test_noise_has_the_width_of_the_state():
    assert drawn(ragged()).noise.shape == (3, 6, SPACE["size"])
