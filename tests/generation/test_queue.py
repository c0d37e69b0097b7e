"""Prompts that wait take the places of answers that have ended, and no answer changes."""

from importlib.metadata import entry_points
from itertools import pairwise
from typing import Literal

import pytest
import torch
import toy_components as toys
from diffusion_models import PROVEN, diffusion_lm, random_tokens, shared_lm, tess_lm
from fake_plugins import installed, plugin
from tape_graph import TapeGraph
from transformers import LogitsProcessorList, StoppingCriteriaList, SynthIDTextWatermarkingConfig

from l2d_framework.errors import ConfigError
from l2d_framework.generation import replay
from l2d_framework.generation.prompts import pad_left
from l2d_framework.guidance import Guidance
from l2d_framework.hooks import GROUP
from l2d_plugins.guidance.classifier_free import ClassifierFree

PROMPTS = [
    *(
        [9, 30, 71, 100, 42, 17, 201],
        [55],
        [120, 9, 8, 7],
        [55, 44, 200, 13, 99],
        [60, 61],
        [5, 6, 7, 8, 9, 10, 11, 12],
    ),
    *([33], [120, 9, 8], [9, 30, 71, 100, 42, 17, 201], [90, 91, 92]),
]
"""Of unequal lengths, one of them twice."""
ENDING = {"eos_token_id": [*range(60, 76)], "do_sample": True}
"""Ends answers after few and many tokens."""


def generate(model, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 14, "num_inference_steps": 3, **ENDING, **options}
    return model.generate(pad_left(prompts), **options)


def check_equal(found, wanted):
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.evaluations, wanted.evaluations)
    assert torch.equal(found.lengths, wanted.lengths)
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, values in wanted.metrics.items():
        assert torch.equal(found.metrics[name].nan_to_num(7.0), values.nan_to_num(7.0))


def sizes(model, **options):
    """Rows that the network denoised together, evaluation for evaluation, and what was generated."""
    seen, shadow = [], model.backbone.shadows[0]
    handle = shadow.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    try:
        found = generate(model, **options)
    finally:
        handle.remove()
    return seen, found


@pytest.mark.parametrize("family", PROVEN)
def test_answers_are_those_of_one_batch(family):
    model = shared_lm(family)
    free = generate(model, eos_token_id=None).answers
    ends = {"eos_token_id": free[[1, 3, 5, 8], [2, 5, 9, 3]].tolist()}
    wanted = generate(model, **ends)
    assert len(wanted.lengths.unique()) > 1
    for size in (1, 3):
        check_equal(generate(model, batch_size=size, **ends), wanted)


def test_places_are_never_empty_while_somebody_waits():
    seen, found = sizes(diffusion_lm(), batch_size=3)
    assert sum(seen) == 2 * int(found.lengths.sum())  # at t = 0 the network is not asked
    full = [size == 3 for size in seen]
    assert full == sorted(full, reverse=True)
    assert sum(full) > len(full) / 2


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 4},
        {"num_return_sequences": 2, "seed": [*range(10)]},
        {"num_inference_steps": 0},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
        {"solver": "fehlberg2", "num_inference_steps": None, "max_new_tokens": 6},
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
        {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)},
        {"patience": 2, "num_inference_steps": 7},
        {"speculate": 3},
        {"speculate": "auto"},
        {"eos_token_id": None, "max_new_tokens": 5},
        {"max_new_tokens": 1},
    ],
)
def test_they_are_with_every_option(options):
    model = shared_lm()
    wanted = generate(model, **options)
    check_equal(generate(model, batch_size=3, **options), wanted)


def test_they_are_with_classes_scales_and_a_guidance_that_reads_the_sequence():
    model = shared_lm(classes=("a", "b"))
    classes = {"classes": ["a", None, "b", "a", "b"] * 2}
    scaled = {"guidance": [ClassifierFree()], "guidance_scale": [0.5 * n for n in range(10)]}
    with installed(*entry_points(group=GROUP), plugin("recalling", [toys.Recalling])):
        for options in (scaled, {"guidance": [toys.Recalling(), ClassifierFree(scale=1.5)]}):
            wanted = generate(model, **classes, **options)
            check_equal(generate(model, batch_size=3, **classes, **options), wanted)


def test_what_guidance_records_stays_with_its_row():
    model = shared_lm()
    with installed(*entry_points(group=GROUP), plugin("noting", [Noting])):
        found, wanted = (generate(model, guidance=[Noting()], batch_size=size) for size in (3, None))
    assert (~wanted.metrics["top"].isnan()).sum(1).tolist() == (3 * wanted.lengths).tolist()
    torch.testing.assert_close(found.metrics["top"], wanted.metrics["top"], equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}, {"speculate": 2}])
def test_prompts_that_begin_alike_are_read_once_for_all_that_wait(options):
    model, shared = diffusion_lm(), random_tokens(1, 40)[0].tolist()
    prompts = [[*shared, *prompt] for prompt in PROMPTS]
    shapes = []
    model.backbone.main.layers[0].register_forward_hook(lambda module, given, out: shapes.append(given[0].shape[1]))
    found = generate(model, prompts, batch_size=3, **options)
    assert [length for length in shapes if length > 8] == [40]
    check_equal(found, generate(model, prompts, **options))


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_a_prompt_is_read_once_for_all_of_its_answers(batch_size):
    model, tokens = diffusion_lm(), []
    model.backbone.main.layers[0].register_forward_hook(
        lambda module, given, out: tokens.append(given[0].shape[0] * given[0].shape[1])
    )
    prompts = random_tokens(3, 9).tolist()
    found = generate(model, prompts, batch_size=batch_size, num_return_sequences=7)
    assert sum(tokens) == 3 * 8 + int(found.lengths.sum())
    check_equal(found, generate(model, prompts, num_return_sequences=7))


class Noting(Guidance):
    """Changes nothing and notes the largest logit."""

    name: Literal["noting"] = "noting"

    def __call__(self, predict, query, space):
        found = predict(query)
        space.record("top", found.logits.amax((1, 2)))
        return found


class Twice:
    def __call__(self, ids, scores):
        return scores * 2


WHOLE = [
    {"logits_processor": LogitsProcessorList([Twice()])},
    {"observer": lambda evaluation: None},
    {"max_time": 1e6},
]


@pytest.mark.parametrize("options", WHOLE)
def test_what_knows_the_rows_of_its_batch_gets_whole_batches(options):
    model = diffusion_lm()
    wanted = generate(model, **options)
    seen, found = sizes(model, batch_size=3, **options)
    assert seen[0] == max(seen) == 3
    assert sum(seen) < 3 * len(seen)
    assert any(small < large for small, large in pairwise(seen))  # another batch begins once the first has ended
    check_equal(found, wanted)


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}])
@pytest.mark.parametrize("block_size", [None, 2])
def test_tokens_that_are_denoised_together_come_in_whole_batches(block_size, options):
    model = tess_lm(block_size=block_size)
    options = {"max_new_tokens": 6, "num_inference_steps": 3, **options}
    wanted = generate(model, PROMPTS[:5], **options)
    for size in (1, 2, 4):
        check_equal(generate(model, PROMPTS[:5], batch_size=size, **options), wanted)


def test_criteria_of_the_caller_judge_the_rows_they_are_shown():
    class Even:
        def __call__(self, ids, scores, **_):
            return ids[:, -1] % 3 == 0

    model, criteria = shared_lm(), StoppingCriteriaList([Even()])
    wanted = generate(model, stopping_criteria=criteria, eos_token_id=None)
    check_equal(generate(model, stopping_criteria=criteria, eos_token_id=None, batch_size=3), wanted)


@pytest.mark.parametrize("options", [{}, WHOLE[0]])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_each_answer_is_told_as_soon_as_it_has_ended(batch_size, options):
    model, told, rounds = diffusion_lm(), {}, []
    model.backbone.shadows[0].register_forward_hook(lambda *_: rounds.append(1))

    def note(number, tokens, evaluations, recorded):
        assert recorded == {}
        told[number] = tokens, evaluations, len(rounds)

    found = generate(model, batch_size=batch_size, on_answer=note, num_return_sequences=2, **options)
    rows = zip(found.answers.tolist(), found.evaluations.tolist(), found.lengths.tolist(), strict=True)
    assert {n: (t, e) for n, (t, e, _) in told.items()} == {
        number: (tokens[:length], evaluations[:length]) for number, (tokens, evaluations, length) in enumerate(rows)
    }
    when = [at for *_, at in told.values()]
    assert when == sorted(when)
    assert when[0] < when[-1]


@pytest.mark.parametrize("steps", [256, 3])
def test_replayed_rows_are_replaced_too(monkeypatch, steps):
    graphs = []
    monkeypatch.setitem(replay.GRAPHS, "cpu", lambda device: graphs.append(TapeGraph()) or graphs[-1])
    monkeypatch.setattr(replay, "_STEP", steps)
    model = shared_lm()
    found = generate(model, batch_size=4)
    assert sum(graph.made is not None for graph in graphs) > 1
    check_equal(found, generate(model, graph=False))


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "auto"])
def test_other_sizes_are_refused_by_name(batch_size):
    with pytest.raises(ConfigError, match="batch_size"):
        generate(shared_lm(), batch_size=batch_size)


def test_what_is_told_is_a_function():
    with pytest.raises(ConfigError, match="on_answer should be a function"):
        generate(shared_lm(), on_answer=3)
