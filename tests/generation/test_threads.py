"""Threads that share one model get the answers they would get one after the other."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
import transformers
from diffusion_models import diffusion_lm, random_tokens, tess_lm
from tiny_models import SIZES, tiny_lm, tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from l2d_framework.generation.prompts import Encoded, pad_left
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.registry import catalog
from l2d_framework.tracing import Recorder
from l2d_plugins.drafters import assistant_network
from l2d_plugins.guidance.classifier_free import ClassifierFree
from l2d_plugins.guidance.reward_gradient import RewardGradient

THREADS = 8


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """A hundred times as often as usual, so that what threads share shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def all_at_once(call: Callable[[int], Any]) -> list[Any]:
    barrier = Barrier(THREADS)

    def wait(number: int) -> Any:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(wait, range(THREADS)))


def at_once_and_one_by_one(call: Callable[[int], Any]) -> Iterator[tuple[Any, Any]]:
    """At once first, so that nothing has been made before."""
    return zip(all_at_once(call), map(call, range(THREADS)), strict=True)


def test_eight_threads_that_ask_first_get_one_registry_with_nothing_broken():
    catalog._loaded.cache_clear()
    first, *others = all_at_once(lambda number: catalog.registry())
    assert not first.broken and all(other is first for other in others)


def prompts(number: int) -> Encoded:
    """Batches of other sizes and lengths for every thread."""
    rows, length = 1 + number % 3, 2 + number * 5 % 7
    return pad_left([random_tokens(1, length + row, seed=number)[0].tolist() for row in range(rows)])


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 6,
}
"""Other rotary angles as soon as a text has more than six tokens; transformers keeps them in the model."""


def long_rope() -> PreTrainedModel:
    return tiny_lm("phi3", rope_parameters=LONG_ROPE, original_max_position_embeddings=6)


def guided_l2d() -> DiffusionLM:
    model = diffusion_lm(classes=("a", "b"))
    model.origin = replace(model.origin, sampling=model.sampling(guidance=[ClassifierFree(scale=1.5)]))
    return model


MODELS: dict[str, Callable[[], DiffusionLM]] = {
    "llama": diffusion_lm,
    "gemma3": lambda: diffusion_lm("gemma3_text"),
    "layer norms and copied weights": lambda: diffusion_lm("stablelm", variant="full"),
    "rotary angles by length": lambda: diffusion_lm(long_rope()),
    "classifier-free guidance": guided_l2d,
    "tess": tess_lm,
    "tess with classes over roberta": lambda: tess_lm("roberta", classes=("a", "b")),
    "tess, rotary angles by length": lambda: tess_lm(long_rope()),
}


@pytest.mark.parametrize("kind", MODELS)
def test_eight_threads_give_the_sequential_answers(kind):
    model = MODELS[kind]()

    def answer(number):
        encoded, seen = prompts(number), []
        found = model.generate(
            encoded,
            classes=[model.origin.classes[number % 2]] * len(encoded.input_ids) if model.origin.classes else None,
            observer=lambda evaluation: seen.append(evaluation.logits.clone()),
            num_inference_steps=3,
            max_new_tokens=3,
            eos_token_id=None,
            do_sample=number % 2 == 0,
        )
        return found, seen

    for (found, logits), (wanted, wanted_logits) in at_once_and_one_by_one(answer):
        assert torch.equal(found.sequences, wanted.sequences)
        assert torch.equal(found.evaluations, wanted.evaluations)
        assert len(logits) == len(wanted_logits)
        assert all(map(torch.equal, logits, wanted_logits))


def test_threads_with_reward_guidance_load_one_reward_model_and_give_the_sequential_rewards(tmp_path, monkeypatch):
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, load = [], transformers.AutoModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForSequenceClassification,
        "from_pretrained",
        lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs),
    )
    model = tess_lm(tokenizer=True)
    guidance = [RewardGradient(model=str(tmp_path), scale=3.0, gumbel="soft")]

    def answer(number):
        return model.generate(prompts(number), guidance=guidance, max_new_tokens=3, eos_token_id=None)

    for found, wanted in at_once_and_one_by_one(answer):
        assert torch.equal(found.sequences, wanted.sequences)
        assert torch.equal(found.metrics["reward"], wanted.metrics["reward"])
    assert len(loaded) == 1


def test_threads_with_an_assistant_share_its_weights_and_guess_as_one_by_one(tmp_path):
    long_rope().save_pretrained(tmp_path)
    model, drafter = diffusion_lm(long_rope()), {"name": "assistant", "model": str(tmp_path)}

    def answer(number):
        options = {"num_inference_steps": 3, "max_new_tokens": 6, "eos_token_id": None}
        return model.generate(prompts(number), speculate=3, drafter=drafter, **options)

    before = assistant_network._load.cache_info().misses
    for found, wanted in at_once_and_one_by_one(answer):
        assert torch.equal(found.sequences, wanted.sequences)
        assert found.guesses == wanted.guesses
    assert assistant_network._load.cache_info().misses == before + 1


def test_threads_give_the_sequential_traces_of_texts_with_stop_strings_and_templates():
    model = diffusion_lm(tokenizer=True)

    def trace(number):
        recorder, text = Recorder(), "abcdefgh"[number:]
        found = model.generate(
            [[{"role": "user", "content": text}] if number % 2 else text],
            observer=recorder,
            num_inference_steps=3,
            max_new_tokens=3,
            stop_strings=[f"stop{number}", f"{number}{number}{number}"],
        )
        return recorder.finish(found.sequences[0].tolist()).to_json()

    for found, wanted in at_once_and_one_by_one(trace):
        assert json.dumps(found) == json.dumps(wanted)


def test_threads_share_the_face_of_transformers():
    face = diffusion_lm("qwen3").as_transformers(num_inference_steps=3)

    def answer(number):
        encoded = prompts(number)
        return face.generate(encoded.input_ids, attention_mask=encoded.attention_mask, max_new_tokens=3, num_beams=2)

    assert all(torch.equal(found, wanted) for found, wanted in at_once_and_one_by_one(answer))


@pytest.mark.parametrize("make", [diffusion_lm, tess_lm])
@pytest.mark.parametrize("output", ["output_hidden_states", "output_attentions"])
def test_a_base_that_asks_for_more_outputs_gathers_no_hooks_and_answers_as_without(make, output):
    options = {"num_inference_steps": 3, "max_new_tokens": 3, "eos_token_id": None}
    lm, prompt = tiny_lm(attn_implementation="eager", **{output: True}), random_tokens(2, 4)
    model, plain = make(lm), make(tiny_lm(attn_implementation="eager"))
    assert torch.equal(model.generate(prompt, **options).sequences, plain.generate(prompt, **options).sequences)
    before = hooks(lm)
    model.generate(prompt, **options)
    assert hooks(lm) == before


def hooks(lm: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.modules())
