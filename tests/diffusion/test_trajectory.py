"""The loss along a model's own trajectory: that of the solves it will make, and what it teaches."""

import pytest
import torch
from diffusion_models import diffusion_lm, fresh_lm, random_tokens, shared_lm, tess_lm
from torch.nn.functional import cross_entropy

from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.diffusion.sampler import Block, Sampler
from l2d_framework.diffusion.training_noise import NoiseRule, draw_solves
from l2d_framework.diffusion.trajectory import trajectory_loss
from l2d_framework.types import Layout

ROWS = 5
KEYS = [(0, 0, row) for row in range(ROWS)]


def ragged():
    """Texts with 2 to 5 tokens to learn, some of them followed by padding."""
    blocks = torch.zeros(ROWS, 8, dtype=torch.int64)
    for row in range(ROWS):
        blocks[row, 2 : 4 + row % 4] = torch.arange(1, 3 + row % 4)
    blocks[1, 6:] = -1
    return Layout(random_tokens(ROWS, 8), blocks)


def solves(layout, keys=KEYS, *, fewest=2, most=6, **rule):
    return draw_solves(layout, NoiseRule(keys=keys, **rule), fewest=fewest, most=most)


def losses(model, layout, keys=KEYS, *, classes=None, counted=None, **rule):
    return trajectory_loss(model, layout, solves(layout, keys, **rule), classes=classes, counted=counted, chunk=4)


def argmax(model):
    model.parametrization = model.parametrization.with_estimate({"mode": "argmax"})
    return model


@pytest.mark.parametrize(
    ("make", "options"),
    [(fresh_lm, {}), (diffusion_lm, {"carry": True}), (diffusion_lm, {"space": {"self_conditioning": "add"}})],
)
def test_it_is_the_cross_entropy_of_what_sampling_predicts_from_the_same_noise(make, options, monkeypatch):
    model, layout = argmax(make(**options)), ragged()
    found = losses(model, layout)
    drawn = solves(layout)
    noise = model.parametrization.noise(drawn.random)
    seen = []
    for place, (row, count) in enumerate(zip(drawn.rows.tolist(), drawn.counts, strict=True)):
        monkeypatch.setattr(TokenStreams, "normal", lambda self, size, place=place: noise[place : place + 1])
        one = Layout(layout.tokens[row : row + 1], layout.blocks[row : row + 1])
        keys = [[("x", i) for i in range(drawn.positions.shape[1])]]
        block = Block(drawn.positions[place : place + 1], one, model.backbone.read(one), keys)
        sampling = model.sampling(num_inference_steps=count, solver="euler", estimate={"mode": "argmax"})
        evaluations = []
        Sampler.of(model, sampling, evaluations.append)(block)
        targets = one.tokens.gather(1, block.positions)[0]
        for evaluation in evaluations:
            each = cross_entropy(evaluation.logits[0], targets, reduction="none")
            seen += [(row, float(evaluation.t[0, 0]), e) for e in each[drawn.valid[place]].tolist()]
    rows, times = found.row.tolist(), found.t.tolist()
    mine = sorted((r, round(t, 5), round(e, 3)) for r, t, e in zip(rows, times, found.tokens.tolist(), strict=True))
    theirs = sorted((r, round(t, 5), round(e, 3)) for r, t, e in seen)
    assert len(set(drawn.counts)) > 2
    for (row, t, loss), (other, s, wanted) in zip(mine, theirs, strict=True):
        assert (row, t) == (other, s)
        assert loss == pytest.approx(wanted, abs=2e-3)


def test_the_total_has_the_mean_over_the_evaluations_of_each_example():
    model, layout = shared_lm(carry=True), ragged()
    with torch.no_grad():
        for draws in (1, 3):
            found, drawn = losses(model, layout, draws=draws), solves(layout, draws=draws)
            counts = dict(zip(drawn.rows.tolist(), drawn.counts, strict=True))
            share = torch.tensor([1 / (draws * counts[row]) for row in found.row.tolist()])
            torch.testing.assert_close(found.total, (found.tokens * share).sum())
            assert found.count == int((layout.blocks >= 1).sum())
            assert len(found.tokens) == sum(
                draws * counts[row] * int((layout.blocks[row] >= 1).sum()) for row in range(ROWS)
            )


@pytest.mark.parametrize("options", [{"carry": True}, {"carry": True, "classes": ("a", "b")}])
def test_an_example_loses_what_it_loses_alone(options):
    model, layout = shared_lm(**options), ragged()
    classes = torch.tensor([0, 1, -1, 0, 1]) if "classes" in options else None
    with torch.no_grad():
        together = losses(model, layout, classes=classes, class_dropout=0.3, draws=2)
        for row in range(ROWS):
            length = int(layout.present[row].sum())
            part = Layout(layout.tokens[row : row + 1, :length], layout.blocks[row : row + 1, :length])
            own = None if classes is None else classes[row : row + 1]
            alone = losses(model, part, [KEYS[row]], classes=own, class_dropout=0.3, draws=2)
            torch.testing.assert_close(together.tokens[together.row == row], alone.tokens, rtol=1e-3, atol=1e-3)


def test_in_half_precision_the_total_stays_single():
    model, layout = shared_lm(carry=True), ragged()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, drawn = losses(model, layout), solves(layout)
    counts = dict(zip(drawn.rows.tolist(), drawn.counts, strict=True))
    share = torch.tensor([1 / counts[row] for row in found.row.tolist()])
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, (found.tokens * share).sum())


def test_what_is_not_counted_is_solved_and_not_learnt():
    model, layout = shared_lm(carry=True), ragged()
    counted = torch.zeros_like(layout.blocks, dtype=torch.bool)
    counted[:, 2] = True
    with torch.no_grad():
        some, every = losses(model, layout, counted=counted), losses(model, layout)
    assert some.count == ROWS
    torch.testing.assert_close(some.tokens, every.tokens[every.position == 2])


def test_numbers_of_evaluations_are_drawn_from_the_whole_range():
    layout = Layout(torch.zeros(600, 2, dtype=torch.int64), torch.tensor([[0, 1]]).expand(600, -1))
    counts = solves(layout, [(0, row) for row in range(600)], fewest=3, most=5).counts
    assert counts == sorted(counts, reverse=True)
    assert all(counts.count(number) > 150 for number in (3, 4, 5))


def gradients(model, layout, **rule):
    model.zero_grad()
    losses(model, layout, **rule).total.backward()
    return {name: p.grad for name, p in model.own_parameters().items()}


def test_later_losses_teach_what_earlier_evaluations_leave():
    model, layout = diffusion_lm(carry=True), ragged()
    found = gradients(model, layout, fewest=3, most=3)
    assert found["backbone.carried"].abs().max() > 0
    # Without the loss of the evaluations in between their weights still learn, by the state alone.
    only_last = losses(model, layout, fewest=3, most=3)
    assert only_last.total.requires_grad
    states = []
    carry = model.backbone.carry
    model.backbone.carry = lambda hidden: states.append(hidden) or carry(hidden)
    loss = losses(model, layout, fewest=3, most=3).total
    (first, second) = states
    assert not first.requires_grad  # the language model's, which is frozen
    slope = torch.autograd.grad(loss, second)[0]
    assert slope.abs().max() > 0


def test_a_map_of_zeros_learns_once_the_path_says_something():
    model, layout = diffusion_lm(carry=True), ragged()
    model.own_parameters()["backbone.carried"].data.zero_()
    assert gradients(model, layout)["backbone.carried"].abs().max() > 0


def test_states_and_estimates_pass_no_gradient():
    model, layout = diffusion_lm(), ragged()
    found = gradients(model, layout)
    assert found["parametrization.vocabulary.weight"] is None
    assert found["parametrization.translation.0.weight"].abs().max() > 0


def test_a_canvas_learns_along_its_trajectory_too():
    model, layout = tess_lm(), ragged()
    layout = Layout(layout.tokens, layout.blocks.clamp_max(1))
    found = losses(model, layout)
    assert found.total.isfinite()
    found.total.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.backbone.time.parameters())
