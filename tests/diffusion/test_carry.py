"""Hidden states that a backbone carries from one evaluation of a solve to the next."""

import pytest
import torch
from diffusion_models import diffusion_lm, fresh_lm, random_tokens, shared_lm, supervised
from tape_graph import TapeGraph

from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.rng import request_keys
from l2d_framework.diffusion.sampler import Block, Sampler
from l2d_framework.generation import replay
from l2d_framework.generation.prompts import pad_left
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_plugins.guidance.classifier_free import ClassifierFree

PROMPTS = [[9, 30, 71, 100, 42, 17, 201], [55, 44], [120, 9, 8, 7], [55, 44, 200, 13, 99]]
CLASSES = ("a", "b")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def carrying(**options):
    return shared_lm(carry=True, **options)


def watched(model):
    """The model, which keeps every query and what answered it."""

    class Watched(DiffusionLM):
        def features(self, query):
            found = super().features(query)
            seen.append((query, found))
            return found

    seen, other = [], Watched(model.schedule, model.parametrization, model.backbone, model.block_size)
    other.origin = model.origin
    return other, seen


def generate(model, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 6, "num_inference_steps": 5, "eos_token_id": None, **options}
    return model.generate(pad_left(prompts), **options)


def evaluations(model, **options):
    seen = []
    generate(model, observer=seen.append, **options)
    return torch.stack([one.logits for one in seen])


def test_a_map_of_zeros_carries_nothing():
    without, with_map = diffusion_lm(), fresh_lm(carry=True)
    weights = without.own_parameters()
    own = with_map.own_parameters()
    assert [name for name in own if name not in weights] == ["backbone.carried"]
    assert not own["backbone.carried"].any()
    for name, weight in weights.items():
        own[name].copy_(weight)
    assert torch.equal(evaluations(with_map), evaluations(without))


def test_what_is_carried_matters():
    model, other = carrying(), diffusion_lm(carry=True)
    other.own_parameters()["backbone.carried"].zero_()
    assert not torch.allclose(evaluations(model)[1:5], evaluations(other)[1:5], atol=1e-2)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_every_evaluation_goes_on_from_the_one_before_and_every_token_begins_anew(solver):
    model, seen = watched(carrying())
    generate(model, solver=solver, max_new_tokens=2)
    assert len(seen) == 10
    for number, (query, _) in enumerate(seen):
        if number % 5:
            assert torch.equal(query.carried, seen[number - 1][1])
        else:
            assert query.carried is None


def test_without_guidance_or_observer_logits_are_still_made_in_pieces(monkeypatch):
    wanted = generate(carrying(), guidance=[]).sequences
    monkeypatch.setattr("l2d_framework.diffusion.ode.CHUNK", 1)
    monkeypatch.setattr(Diffusion, "forward", None)
    assert torch.equal(generate(carrying(), guidance=[]).sequences, wanted)


def test_every_branch_of_a_guidance_has_a_state_of_its_own():
    model, seen = watched(carrying(classes=CLASSES))
    guidance = [ClassifierFree(scale=2.0)]
    generate(model, guidance=guidance, classes=["a"] * 4, max_new_tokens=1, solver="euler")
    branches = [found.chunk(2, 1) for _, found in seen]
    assert not torch.equal(*branches[1])
    for (query, _), before in zip(seen[1:], branches, strict=False):
        assert torch.equal(query.carried, torch.cat(before, 1))
    # The class's own answers are those without guidance as long as the states are: at the first move's end.
    alone, seen = watched(carrying(classes=CLASSES))
    generate(alone, classes=["a"] * 4, max_new_tokens=1, solver="euler")
    torch.testing.assert_close(seen[0][1], branches[0][0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "heun"},
        {"patience": 1, "num_inference_steps": 15},
        {"solver": {"name": "fehlberg2", "rtol": 1.0, "atol": 1.0}, "num_inference_steps": None},
        {"batch_size": 2},
    ],
)
def test_a_row_is_answered_alike_alone_and_among_others(options):
    ends = {"eos_token_id": [*range(60, 160)], "max_new_tokens": 12}
    together = generate(carrying(), **ends, **options)
    assert len(set(together.lengths.tolist())) > 1
    for row, prompt in enumerate(PROMPTS):
        alone = generate(carrying(), [prompt], **ends, **{**options, "batch_size": 1})
        count = int(alone.lengths)
        assert together.lengths[row] == count
        first = together.sequences.shape[1] - 12 if together.sequences.shape[1] > 12 else 0
        width = max(map(len, PROMPTS))
        assert first <= width
        found = together.sequences[row, width : width + count]
        assert torch.equal(found, alone.sequences[0, len(prompt) : len(prompt) + count])
        assert torch.equal(together.evaluations[row, :count], alone.evaluations[0, :count])


def test_tokens_guessed_ahead_are_those_without_guesses():
    model = carrying()
    assert torch.equal(generate(model, speculate=3).sequences, generate(model, speculate="off").sequences)


def test_a_replayed_solve_carries_them_too(monkeypatch):
    graphs = []
    wanted = generate(carrying(), graph=False, max_new_tokens=8).sequences
    monkeypatch.setitem(replay.GRAPHS, "cpu", lambda device: graphs.append(TapeGraph()) or graphs[-1])
    assert torch.equal(generate(carrying(), max_new_tokens=8).sequences, wanted)
    assert any(graph.made is not None for graph in graphs)


def test_with_the_true_past_given_a_token_is_solved_as_it_is_generated():
    model, tokens, seen = carrying(), random_tokens(1, 7), []
    wanted = []
    options = {"max_new_tokens": 1, "num_inference_steps": 5, "solver": "euler", "eos_token_id": None}
    for length in (4, 5, 6):
        model.generate(tokens[:, :length], observer=seen.append, **options)
        wanted.append(seen[-1].logits[0, 0])
    positions = torch.tensor([[4, 5, 6]])
    names = [request_keys([tokens[0, :length].tolist()])[0] for length in (4, 5, 6)]
    keys = [[(0, name, 4 + number, 0) for number, name in enumerate(names)]]
    layout = supervised(tokens, known=4)
    block = Block(positions, layout, model.backbone.read(layout), keys)
    found = Sampler.of(model, model.sampling(num_inference_steps=5, solver="euler"))(block)
    (logits,) = (part for _, part in found.logits.parts())
    torch.testing.assert_close(logits[0], torch.stack(wanted), rtol=1e-4, atol=1e-4)
