"""Masked diffusion, which no Gaussian path describes, learns and generates by the interfaces alone."""

from importlib import metadata
from itertools import pairwise, product
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from fake_plugins import installed, plugin
from masked_diffusion import Masked, MaskedEstimate, Masking, Unmask
from tiny_models import tiny_lm
from toy_components import Read

from l2d_framework.backbone import Backbone
from l2d_framework.component import merged
from l2d_framework.config import SamplingSection, parse_run
from l2d_framework.diffusion.loss import denoising_loss
from l2d_framework.diffusion.training_noise import Draws, NoiseRule, draw
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.diagnosis.curves import TokenLikelihood
from l2d_framework.hooks import GROUP
from l2d_framework.models import checkpoint
from l2d_framework.models.diffusion_lm import DiffusionLM, Origin
from l2d_framework.types import Layout
from l2d_plugins.backbones.in_place import InPlaceConfig
from l2d_plugins.solvers.runge_kutta import Euler

TOKENS, LENGTH = 4, 3


@pytest.fixture(scope="module", autouse=True)
def offered():
    """The toys as one more installed plugin."""
    with installed(*metadata.entry_points(group=GROUP), plugin("masked", [Masking, Masked, Unmask])):
        yield


class Conditionals(Backbone):
    """The true distribution of each of three tokens given those that are not masked."""

    trains_lm: ClassVar[bool] = False

    def __init__(self):
        super().__init__()
        self.config, self.lm = SimpleNamespace(num_classes=0), tiny_lm()
        self.vocab_size = self.hidden_size = TOKENS
        generator = torch.Generator().manual_seed(3)
        self.joint = torch.randn([TOKENS] * LENGTH, generator=generator).flatten().softmax(0).view([TOKENS] * LENGTH)

    def table(self):
        return torch.eye(TOKENS)

    def read(self, layout):
        return Read(layout, layout.tokens)

    def extend(self, context, tokens):
        raise AssertionError("nothing is generated")

    def features(self, h, t, positions, context, condition, *, shared_time=None):
        allowed = torch.where(h.sum(-1, keepdim=True) > 0, h, 1.0)
        sides = []
        for place in range(LENGTH):
            # What a token is itself is left to the state space to say.
            others = torch.where(torch.arange(LENGTH)[:, None] == place, 1.0, allowed)
            weighted = torch.einsum("abc,ra,rb,rc->rabc", self.joint, *others.unbind(1))
            sides.append(weighted.sum([1 + other for other in range(LENGTH) if other != place]))
        return torch.stack(sides, 1).log()

    head = property(lambda self: torch.nn.Identity())


def test_the_weighted_loss_of_the_true_conditionals_is_the_likelihood_of_every_text():
    network = Conditionals()
    space = Masked().build(TOKENS, TOKENS)
    torch.nn.init.zeros_(space.mask)
    model = DiffusionLM(Masking(), space, network, None)
    # Given which tokens are masked the loss is a polynomial in t, so three points of Gauss's integrate it exactly.
    points, shares = np.polynomial.legendre.leggauss(3)
    masks = list(product((0, 1), repeat=LENGTH))
    for text in product(range(TOKENS), repeat=LENGTH):
        cases = [(m, (1 + x) / 2, s / 2) for m in masks for x, s in zip(points, shares, strict=True)]
        hidden = torch.tensor([m for m, _, _ in cases])
        t = torch.tensor([x for _, x, _ in cases], dtype=torch.float32)[:, None].expand(-1, LENGTH)
        chance = torch.where(hidden > 0, 1 - t, t).prod(1) * torch.tensor([s for _, _, s in cases])
        tokens = torch.tensor([(0, *text)]).expand(len(cases), -1)
        draws = Draws(
            positions=torch.arange(1, 1 + LENGTH).expand(len(cases), -1),
            valid=torch.ones(len(cases), LENGTH, dtype=torch.bool),
            t=t,
            noise=torch.where(hidden > 0, 20.0, -20.0)[..., None].expand(-1, -1, 2),
            kept=torch.ones(len(cases), LENGTH, dtype=torch.bool),
            first_t=t,
            conditioned=torch.zeros(len(cases), dtype=torch.bool),
        )
        blocks = torch.tensor([[0, *[1] * LENGTH]]).expand(len(cases), -1)
        with torch.no_grad():
            losses = denoising_loss(model, Layout(tokens, blocks), draws)
        bound = (losses.tokens.view(-1, LENGTH).sum(1) * chance.float()).sum()
        torch.testing.assert_close(bound, -network.joint[text].log().float(), rtol=1e-4, atol=1e-4)
        assert not losses.tokens[hidden.flatten() == 0].any()


@pytest.fixture(scope="module")
def echo():
    """A tiny model that has learnt to repeat the last token of its prompt four times."""
    torch.manual_seed(0)
    network = InPlaceConfig().build(tiny_lm())
    model = DiffusionLM(Masking(), Masked().build(network.vocab_size, network.hidden_size), network, None)
    optimizer = torch.optim.AdamW(model.own_parameters().values(), lr=3e-3)
    history = []
    for step in range(200):
        prompt = torch.randint(10, 18, (16, 3))
        tokens = torch.cat([prompt, prompt[:, -1:].expand(-1, 4)], 1)
        layout = Layout(tokens, torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(16, -1))
        losses = denoising_loss(model, layout, draw(model, layout, NoiseRule([(0, step, i) for i in range(16)])))
        optimizer.zero_grad()
        (losses.total / losses.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(float(losses.cross_entropies.mean()))
    assert history[0] > 1 > 20 * sum(history[-20:]) / 20
    return model.eval()


PROMPT = torch.tensor([[11, 12, 13], [10, 17, 16]])


def filled(model, solver, steps, estimate="argmax"):
    """Generated tokens, and the states the network was asked about."""
    states = []
    sampling = SamplingSection(solver=solver, num_inference_steps=steps, block_size=None, estimate={"mode": estimate})
    model.origin = Origin(sampling=sampling)
    out = model.generate(PROMPT, max_new_tokens=4, observer=lambda e: states.append(e))
    return out, states


@pytest.mark.parametrize("order", ["random", "certainty"])
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_unmasking_fills_a_whole_block_and_never_takes_a_token_back(echo, order, steps):
    out, seen = filled(echo, Unmask(order_by=order), steps)
    assert torch.equal(out.sequences[:, 3:], PROMPT[:, -1:].expand(-1, 4))
    assert len(seen) == steps
    ids = [evaluation.x[..., 0] for evaluation in seen]
    assert (ids[0] < 0).all()
    assert (ids[-1] >= 0).all()
    for one, other in pairwise(ids):
        assert torch.equal(other[one >= 0], one[one >= 0])
    if order == "certainty":
        assert [int((x < 0).sum(1).max()) for x in ids] == [round(4 * (1 - e.t.max().item())) for e in seen]


def test_the_read_out_is_what_was_unmasked_however_it_was_drawn(echo):
    with torch.no_grad():
        echo.parametrization.mask.add_(3.0)  # the network no longer knows much
        out, seen = filled(echo, Unmask(), 4, estimate="sample")
        echo.parametrization.mask.sub_(3.0)
    assert torch.equal(out.sequences[:, 3:], seen[-1].x[..., 0].long())
    assert not torch.equal(out.sequences[:, 3:], PROMPT[:, -1:].expand(-1, 4))


def test_a_solver_and_a_state_space_of_another_corruption_are_refused_before_weights_are_loaded(echo):
    run = {
        "model": {"base": "none"},
        "schedule": {"name": "masking"},
        "parametrization": {"name": "masked"},
        "backbone": {"name": "in_place"},
        "sampling": {"num_inference_steps": 5, "solver": {"name": "unmask"}},
    }
    assert isinstance(parse_run(run).sampling.solver, Unmask)
    slopes = (
        r"'euler' moves states alpha \* clean \+ sigma \* noise, and those of parametrization 'masked' are of another "
    )
    with pytest.raises(ConfigError, match=slopes + r"corruption than Gaussian noise; use one of \['unmask'\]"):
        parse_run(merged(run, {"sampling": {"solver": {"name": "euler"}}}))
    with pytest.raises(ConfigError, match=slopes):
        filled(echo, Euler(), 5)
    with pytest.raises(
        ConfigError, match=r"'unmask' moves states of another .*'embedding'.* use one of \['bosh3', 'euler'"
    ):
        parse_run(merged(run, {"parametrization": {"name": "embedding"}}))


def test_without_an_observer_the_same_tokens_come_out(echo, monkeypatch):
    out, _ = filled(echo, Unmask(), 4)
    monkeypatch.setattr("l2d_framework.diffusion.ode.CHUNK", 1)
    again = echo.generate(PROMPT, max_new_tokens=4)
    assert torch.equal(again.sequences, out.sequences)


def test_a_masked_model_is_saved_and_loaded_like_any_other(echo, tmp_path):
    out, _ = filled(echo, Unmask(order_by="certainty"), 3)
    echo.backbone.lm.generation_config.pad_token_id = 0
    checkpoint.save(echo, tmp_path)
    again = checkpoint.load(tmp_path)
    assert (again.schedule, again.parametrization.config) == (Masking(), Masked())
    assert torch.equal(again.generate(PROMPT, max_new_tokens=4).sequences, out.sequences)


def test_a_corruption_of_its_own_has_no_gaussian_likelihood(echo):
    with pytest.raises(ConfigError, match=r"'masked' corrupts tokens in a way of its own"):
        TokenLikelihood(echo)


def test_estimate_options_of_the_toy_are_those_of_its_config():
    space = Masked().build(TOKENS, TOKENS)
    assert space.with_estimate({"mode": "sample"}).config == Masked(estimate=MaskedEstimate(mode="sample"))
