"""Scores from the scorer itself, without lm_eval."""

import pytest
import torch
from diffusion_models import fresh_lm, tess_lm

from l2d_framework.diffusion.loss import Draws, denoising_loss
from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.evaluation.harness.requests import noise_key
from l2d_framework.evaluation.harness.scorer import ScoredQuestion, Scorer
from l2d_framework.types import Layout


@pytest.mark.parametrize(("size", "blocks"), [(None, [1, 1, 1, 1, 1]), (2, [1, 1, 2, 2, 3]), (16, [1, 1, 1, 1, 1])])
def test_the_pseudo_likelihood_is_minus_the_training_loss_of_the_same_blocks(size, blocks):
    model = tess_lm(block_size=size)
    question = ScoredQuestion((5, 6, 7), [(8, 9, 10, 11, 12)])
    scorer = Scorer(model, model.origin.sampling, samples=1, times=1, limit=50)
    # A shorter answer beside it changes nothing.
    ((score, _),), _ = scorer.pseudo([question, ScoredQuestion((5,), [(6, 7)])])
    names = [[(scorer.sampling.seed, noise_key(question.context, 0), slot, 0, "pseudo") for slot in range(3, 8)]]
    everywhere = torch.ones(1, 5, dtype=torch.bool)
    draws = Draws(
        positions=torch.arange(3, 8)[None],
        valid=everywhere,
        t=torch.full((1, 5), 0.5),
        noise=model.parametrization.noise(TokenStreams(names, torch.device("cpu"))),
        kept=everywhere,
        first_t=torch.full((1, 5), 0.5),
        conditioned=torch.zeros(1, dtype=torch.bool),
    )
    layout = Layout(torch.tensor([[*question.context, *question.answers[0]]]), torch.tensor([[0, 0, 0, *blocks]]))
    assert score == pytest.approx(-float(denoising_loss(model, layout, draws).total.detach()), abs=1e-4)


def test_each_time_of_the_pseudo_likelihood_goes_on_from_the_hidden_states_of_the_one_before(monkeypatch):
    model = tess_lm()
    scorer = Scorer(model, model.origin.sampling, samples=2, times=3, limit=50)
    question, shown, left = ScoredQuestion((5, 6, 7), [(8, 9)]), [], []
    ((plain, _),) = scorer.pseudo([question])[0]
    ask = model.features

    def features(query):
        shown.append(query.carried)
        left.append(ask(query))
        return left[-1]

    monkeypatch.setattr(model.backbone, "carries", True)
    monkeypatch.setattr(model.backbone, "carry", lambda hidden: 0.5 * hidden)
    monkeypatch.setattr(model, "features", features)
    ((score, _),) = scorer.pseudo([question])[0]
    assert abs(score - plain) > 1e-3
    for number, state in enumerate(shown):
        assert state is (left[number - 1] if number % 3 else None)


@pytest.mark.parametrize("method", ["mixture", "pseudo"])
def test_layers_are_compiled_for_scores_as_for_answers(method, monkeypatch):
    model, asked = fresh_lm(), []
    features = model.backbone.features
    monkeypatch.setattr(
        model.backbone, "features", lambda *a, compiled=False, **k: asked.append(compiled) or features(*a, **k)
    )
    for compiled in (True, False):
        scorer = Scorer(model, model.sampling(), samples=1, times=1, limit=50, compile=compiled)
        getattr(scorer, method)([ScoredQuestion((5, 6, 7), [(8, 9)])])
        assert asked and set(asked) == {compiled}
        asked.clear()
