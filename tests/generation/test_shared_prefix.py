"""What all prompts begin with is read once, and no answer changes."""

import pytest
import torch
from diffusion_models import PROVEN, diffusion_lm, random_tokens, shared_lm

from l2d_framework.generation import prefix
from l2d_framework.generation.prompts import pad_left

SHARED = random_tokens(1, 40)[0].tolist()
PROMPTS = [[*SHARED, 9, 30, 71], [*SHARED, 55], [*SHARED, 120, 9, 8, 7, 6, 5, 44], [*SHARED, 9]]


def generate(model, prompts, **options):
    options = {"max_new_tokens": 6, "num_inference_steps": 3, "eos_token_id": None, **options}
    return model.generate(pad_left(prompts), **options)


def reads(model):
    """Shapes of all that the language model's first layer reads from now on."""
    shapes = []
    model.backbone.main.layers[0].register_forward_hook(
        lambda module, given, out: shapes.append(tuple(given[0].shape[:2]))
    )
    return shapes


@pytest.mark.parametrize(
    "prompts", [[[*SHARED, 55], [*SHARED, 9, 30, 71]], [SHARED, [*SHARED, 9]], [SHARED, SHARED], [[*SHARED, 5]] * 2]
)
def test_the_order_and_lengths_of_the_rests_do_not_matter(prompts):
    model = shared_lm()
    together = generate(model, prompts)
    assert torch.equal(together.answers[0], generate(model, prompts[:1]).answers[0])
    assert torch.equal(together.answers[1:], generate(model, prompts[::-1]).answers[:1]) or prompts[0] == prompts[1]


@pytest.mark.parametrize("family", PROVEN)
def test_prompts_that_begin_alike_are_answered_as_each_alone(family):
    model = shared_lm(family)
    together = generate(model, PROMPTS, do_sample=True)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(together.answers[row], generate(model, [prompt], do_sample=True).answers[0])


@pytest.mark.parametrize("options", [{"num_return_sequences": 2}, {"speculate": 3}, {"num_inference_steps": 0}])
def test_they_are_with_every_option(options, monkeypatch):
    model = shared_lm()
    found = generate(model, PROMPTS, **options)
    monkeypatch.setattr(prefix, "SHARED", 10**6)
    assert torch.equal(found.sequences, generate(model, PROMPTS, **options).sequences)


def test_what_they_begin_with_is_read_once():
    model = diffusion_lm()
    shapes = reads(model)
    generate(model, PROMPTS, max_new_tokens=1)
    assert shapes[:3] == [(1, 40), (4, 6), (4, 1)]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], [prompt[-8:] for prompt in PROMPTS]])
def test_a_single_prompt_and_short_beginnings_are_read_at_once(prompts):
    model = diffusion_lm()
    shapes = reads(model)
    generate(model, prompts, max_new_tokens=1)
    assert shapes[0] == (len(prompts), max(map(len, prompts)))
