"""A small language model guesses ahead: no answer depends on it, and it reads each token once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import Weights, longer, refuse_weights, swapped, without_tokenizer
from diffusion_models import diffusion_lm, shared_lm
from tiny_models import SIZES, tiny_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from l2d_framework.errors import CheckpointError, ConfigError, L2DError, UnsupportedModelError
from l2d_framework.generation.prompts import pad_left
from l2d_framework.testing import checks_for
from l2d_plugins.drafters import assistant_network
from l2d_plugins.drafters.assistant import Assistant
from l2d_plugins.guidance.classifier_free import ClassifierFree
from l2d_plugins.guidance.reward_gradient import RewardGradient

V = SIZES["vocab_size"]
PROMPTS = [[9, 30, 71, 100, 42, 17, 201], [55], [120, 9, 8, 7], [55, 44, 200, 13, 99], [9, 30, 71, 100, 42, 17, 201]]
"""Of unequal lengths, one of them twice."""
ENDING = {"eos_token_id": [*range(60, 64), *range(200, 204)], "do_sample": True}
"""Ends answers after few and many tokens."""


def write(folder: Path, model: PreTrainedModel, *, tokenizer: bool = True) -> str:
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def near(scale: float = 0.1, **options: Any) -> Any:
    """A model whose diffusion path often agrees with its language model, and at scale 0 always."""
    model = diffusion_lm(**options)
    with torch.no_grad():
        for weight in model.backbone.conditioning.final[2].parameters():
            weight.mul_(scale)
    return model


@pytest.fixture(scope="module")
def itself(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The language model that all models here are built on."""
    return write(tmp_path_factory.mktemp("itself"), tiny_lm())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A smaller one that knows nothing of it."""
    return write(tmp_path_factory.mktemp("other"), tiny_lm("gpt2", seed=5, num_hidden_layers=1))


def generate(model: Any, prompts: Any = PROMPTS, **options: Any) -> Any:
    options = {"max_new_tokens": 12, "num_inference_steps": 3, "eos_token_id": None, **options}
    return model.generate(pad_left(prompts), **options)


def check_equal(found: Any, wanted: Any) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.evaluations, wanted.evaluations)
    assert torch.equal(found.lengths, wanted.lengths)


OPTIONS: list[dict[str, Any]] = [
    {},
    ENDING,
    {**ENDING, "num_return_sequences": 2},
    {**ENDING, "batch_size": 2},
    {"batch_size": 3, "do_sample": True, "repetition_penalty": 1.3, "seed": [1, 2, 3, 4, 5]},
    {"classes": ["a", None, "b", "a", "b"], "guidance": [ClassifierFree(scale=1.5)], "do_sample": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_an_answer_is_the_one_written_token_by_token_whoever_assists(
    itself: str, other: str, options: dict[str, Any]
) -> None:
    model = near(classes=("a", "b") if "classes" in options else ())
    wanted, main_path = generate(model, **options), generate(model, speculate=4, **options)
    found = generate(model, speculate=4, drafter={"name": "assistant", "model": itself}, **options)
    check_equal(found, wanted)
    assert found.guesses == main_path.guesses
    check_equal(generate(model, speculate="auto", drafter=Assistant(model=other), **options), wanted)


def test_a_guess_saves_passes_and_an_assistant_has_none_of_the_language_model(itself: str) -> None:
    model, calls = near(scale=0.0), []
    handle = model.backbone.lm.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    counts = {}
    try:
        for name, options in {
            "off": {},
            "main path": {"speculate": 4},
            "assistant": {"speculate": 4, "drafter": Assistant(model=itself)},
        }.items():
            calls.clear()
            found = generate(model, PROMPTS[:1], max_new_tokens=21, **options)
            counts[name] = len(calls)
    finally:
        handle.remove()
    assert found.guesses[0] == found.guesses[1] > 0
    # One token behind the prompt, then five at a time.
    assert counts == {"off": 21, "main path": 21, "assistant": 5}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], torch.Tensor]]:
    """How many tokens of each row were known whenever an assistant reads, and what it reads."""
    seen: list[tuple[list[int], torch.Tensor]] = []
    read = assistant_network.Network.read

    def watched(self: Any, memory: Any, tokens: torch.Tensor) -> Any:
        seen.append(([0] * len(tokens) if memory is None else memory.lengths, tokens))
        return read(self, memory, tokens)

    monkeypatch.setattr(assistant_network.Network, "read", watched)
    return seen


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_each_token_is_read_once(itself: str, reads: Any, scale: float) -> None:
    model = near(scale)
    generate(model, speculate=1, drafter=Assistant(model=itself))  # loaded, which reads an example
    reads.clear()
    found = generate(model, PROMPTS[:1], speculate=4, max_new_tokens=40, drafter=Assistant(model=itself))
    final, text, counts = found.sequences[0].tolist(), [], Counter[int]()
    for (known,), tokens in reads:
        text[known:] = tokens[0].tolist()
        counts.update(place for place in range(known, len(text)) if text[: place + 1] == final[: place + 1])
    assert set(counts.values()) == {1}
    assert len(counts) > 40
    assert (found.guesses[0] == found.guesses[1]) == (scale == 0)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}], ids=str)
def test_of_a_row_that_goes_on_nothing_is_read_again(
    itself: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    kept, ends, known = assistant_network.Reading._kept, {}, 0

    def watched(self: Any, tokens: torch.Tensor, lengths: Any, rows: Any) -> list[int]:
        nonlocal known
        found = kept(self, tokens, lengths, rows)
        for row, count, length in zip(rows, found, lengths, strict=True):
            # What stood there before, and the guesses that were right and read.
            assert count >= ends.get(row, 0)
            known += row in ends
            ends[row] = length
        return found

    monkeypatch.setattr(assistant_network.Reading, "_kept", watched)
    generate(near(), speculate=4, drafter=Assistant(model=itself), **ENDING, **options)
    assert len(ends) == len(PROMPTS) < known


def test_equal_texts_are_read_once(itself: str, reads: Any) -> None:
    begun = Assistant(model=itself).begin(tiny_lm())
    reads.clear()
    texts = [torch.tensor(text) for text in ([5, 6, 7], [8, 9], [5, 6, 7])]
    assert begun._reading is not None
    logits = begun._reading.follow(texts, [0, 1, 2])
    assert [len(tokens) for _, tokens in reads] == [2]
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gemma3_text", "smollm3", "gpt2"])
def test_it_obeys_the_laws_of_drafters(family: str, tmp_path: Path) -> None:
    assistant = Assistant(model=write(tmp_path, tiny_lm(family, vocab_size=11), tokenizer=False))
    for check in checks_for(assistant):
        check(assistant)


@pytest.mark.parametrize("size", [V - 3, V + 5])
def test_a_vocabulary_that_is_padded_otherwise_does_no_harm(size: int, tmp_path: Path) -> None:
    model = near()
    assistant = Assistant(model=write(tmp_path, tiny_lm(seed=3, vocab_size=size)))
    prompts = [[9, V - 1, 71], [V - 2, 8]]
    found = generate(model, prompts, speculate=3, drafter=assistant, **ENDING)
    check_equal(found, generate(model, prompts, **ENDING))


def test_texts_beyond_what_it_can_read_get_no_guesses(tmp_path: Path) -> None:
    model = near()
    assistant = Assistant(model=write(tmp_path, tiny_lm("gpt2", vocab_size=V, max_position_embeddings=10)))
    for prompts in (PROMPTS, [[*range(5, 25)], [7]]):
        check_equal(generate(model, prompts, speculate=4, drafter=assistant), generate(model, prompts))
    assert generate(model, [[*range(5, 25)]], speculate=4, drafter=assistant).guesses == (0, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_obeys_the_laws_where_it_can_read_some_of_the_rows(family: str, tmp_path: Path) -> None:
    lm = tiny_lm(family, vocab_size=11, max_position_embeddings=6)
    assistant = Assistant(model=write(tmp_path, lm, tokenizer=False))
    for check in checks_for(assistant):
        check(assistant)


def test_a_long_row_takes_no_guess_from_a_short_one(tmp_path: Path) -> None:
    model, short, long = near(), PROMPTS[:2], [[*range(5, 45)]]
    assistant = Assistant(model=write(tmp_path, tiny_lm(max_position_embeddings=20)))
    _, right = generate(model, short, speculate=4, drafter=assistant).guesses
    assert right > 5
    for prompts in (long + short, short + long):
        found = generate(model, prompts, speculate=4, drafter=assistant)
        check_equal(found, generate(model, prompts))
        assert found.guesses[1] >= 0.8 * right


def test_it_computes_in_the_type_of_the_model_and_costs_what_it_weighs(itself: str, other: str) -> None:
    lm = tiny_lm().to(torch.bfloat16)
    for name, low, high in ((itself, 1.0, 1.0), (other, 0.0, 0.9)):
        assistant = Assistant(model=name)
        begun = assistant.begin(lm)
        assert begun._reading is not None and assistant._reading is None
        assert begun._reading._network.lm.dtype == torch.bfloat16
        assert low <= begun.cost <= high
    assert assistant.cost == 1.0


def test_it_is_loaded_once_stays_frozen_and_keeps_nothing_between_requests(itself: str) -> None:
    assistant, models = Assistant(model=itself), (near(), near(0.3))
    wanted = [generate(model, **ENDING) for model in models]
    assistant.begin(models[0].backbone.lm)
    loaded = assistant_network._load.cache_info().misses
    for _ in range(2):
        for model, answers in zip(models, wanted, strict=True):
            check_equal(generate(model, speculate=3, drafter=assistant, **ENDING), answers)
    assert assistant_network._load.cache_info().misses == loaded
    assert assistant == Assistant(model=itself)
    network = assistant_network.load_assistant(itself, torch.device("cpu"), torch.float32)
    assert not network.lm.training
    assert not any(weight.requires_grad for weight in network.lm.parameters())


def test_it_is_not_loaded_where_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.setattr(assistant_network, "load_assistant", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr("l2d_plugins.drafters.assistant.load_assistant", assistant_network.load_assistant)
    generate(shared_lm(), speculate="auto", drafter=Assistant(model=other), patience=2, num_inference_steps=5)


# Refusals


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_weights(monkeypatch, AutoModelForCausalLM)


@pytest.mark.usefixtures("weightless")
def test_a_fitting_assistant_passes_without_its_weights(other: str) -> None:
    tokenizer = tiny_tokenizer()
    Assistant(model=other).check(tokenizer)
    Assistant(model=other).check(None)
    tokenizer.add_tokens(["<padding>"])
    Assistant(model=other).check(tokenizer)
    with pytest.raises(Weights):
        assistant_network._load.__wrapped__(other, torch.device("cpu"), torch.float32, ())


def _edited(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")


def _swapped_and_longer(folder: Path) -> None:
    longer(folder)
    swapped(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (swapped, "another vocabulary: token .* is 'b' there and 'a' here .* the same tokenizer"),
        (_swapped_and_longer, r"another vocabulary: .* \(261 and 260 tokens\)"),
        (without_tokenizer, "has no tokenizer that could be compared"),
        (lambda folder: (folder / "config.json").unlink(), "neither a model folder here nor a hub repository"),
        (
            lambda folder: _edited(folder, architectures=["LlamaForSequenceClassification"]),
            "was saved as LlamaForSequenceClassification, not as LlamaForCausalLM",
        ),
        (lambda folder: _edited(folder, model_type="vits"), "'vits', for which there is no causal language model"),
        (
            lambda folder: _edited(folder, model_type="mamba", architectures=["MambaForCausalLM"]),
            "MambaForCausalLM, which cannot take tokens back",
        ),
        (lambda folder: _edited(folder, quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized"),
    ],
)
def test_what_cannot_assist_is_refused_before_weights_are_loaded(
    spoil: Any, message: str, tmp_path: Path, weightless: None
) -> None:
    folder = write(tmp_path, tiny_lm())
    spoil(tmp_path)
    with pytest.raises(L2DError, match=message):
        Assistant(model=folder).check(tiny_tokenizer())


@pytest.mark.parametrize("component", [Assistant, RewardGradient])
def test_a_tilde_is_the_home_folder_where_no_shell_has_seen_it(component: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert component(model="~/small").model == "/home/me/small"
    assert component(model="org/~small").model == "org/~small"


@pytest.mark.parametrize(
    ("name", "message"),
    [("/nowhere/at/all", "There is no folder"), ("no-such/model", "hub repository")],
)
def test_an_assistant_that_is_nowhere_is_refused_by_a_request(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(shared_lm(), speculate=2, drafter=Assistant(model=name))


def test_an_assistant_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, tiny_lm(is_causal=False))
    with pytest.raises(UnsupportedModelError, match=r"cannot be read piece by piece: .* off by"):
        Assistant(model=folder).begin(tiny_lm())


def test_an_assistant_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_lm()
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks the weights \['lm_head.weight'\]"):
        Assistant(model=str(tmp_path)).begin(tiny_lm())
