"""Tokens guessed ahead change how fast an answer is written, never the answer."""

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import toy_components as toys
from diffusion_models import PROVEN, diffusion_lm, shared_lm, tess_lm
from fake_plugins import installed, plugin
from transformers import LogitsProcessorList, StoppingCriteriaList, SynthIDTextWatermarkingConfig
from transformers.generation.streamers import BaseStreamer

from l2d_framework.drafter import Drafter
from l2d_framework.errors import ConfigError, L2DError, PluginError
from l2d_framework.generation import pass_times as timing
from l2d_framework.generation import speculation
from l2d_framework.generation.pass_times import pass_times
from l2d_framework.generation.prompts import pad_left
from l2d_framework.generation.speculation import Guesses
from l2d_framework.hooks import GROUP
from l2d_plugins.guidance.classifier_free import ClassifierFree

PROMPTS = [[9, 30, 71, 100, 42, 17, 201], [55, 44], [120, 9, 8, 7], [55, 44, 200, 13, 99]]


def near(family="llama", scale=0.1, **options):
    """A model whose diffusion path often agrees with its language model, and not always."""
    model = diffusion_lm(family, **options)
    with torch.no_grad():
        for weight in model.backbone.conditioning.final[2].parameters():
            weight.mul_(scale)
    return model


def generate(model, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 20, "num_inference_steps": 3, "eos_token_id": None, **options}
    return model.generate(pad_left(prompts), **options)


def check_equal(found, wanted):
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.evaluations, wanted.evaluations)
    assert torch.equal(found.lengths, wanted.lengths)


ENDING = {"eos_token_id": [*range(60, 90), *range(200, 220)], "do_sample": True}


@pytest.mark.parametrize("family", PROVEN)
def test_an_answer_is_the_one_written_token_by_token(family):
    model = near(family, scale=10.0 if "gemma" in family else 0.3 if family == "smollm3" else 0.1)
    for options, speculate in ((ENDING, 4), ({}, "auto")):
        wanted = generate(model, **options)
        assert wanted.guesses == (0, 0)
        found = generate(model, speculate=speculate, **options)
        check_equal(found, wanted)
    # Of answers that end soon there are so few guesses that on some machine all may be wrong.
    made, right = found.guesses
    assert made > right > 5


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 0.7, "top_k": 20},
        {"min_new_tokens": 6, **ENDING},
        {"estimate": {"mode": "average"}, "solver": "rk4", "num_inference_steps": 5},
        {"solver": "fehlberg2", "num_inference_steps": None, "max_new_tokens": 6},
        {"num_return_sequences": 3, **ENDING},
        {"seed": [1, 2, 3, 4], "do_sample": True},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
)
def test_it_is_with_every_option(options):
    model = near()
    wanted = generate(model, **options)
    for speculate in (2, 30):
        check_equal(generate(model, speculate=speculate, **options), wanted)


def test_it_is_with_classes_and_guidance():
    model = near(classes=("a", "b"))
    options = {"classes": ["a", None, "b", "a"], "guidance": [ClassifierFree(scale=1.5)], "do_sample": True}
    found = generate(model, speculate=3, **options)
    check_equal(found, generate(model, **options))
    assert found.guesses[1] > 0


class Drafts(Drafter):
    """What a function makes of the texts and the number of tokens that are wanted."""

    name: Literal["drafts"] = "drafts"
    make: Any = None

    def draft(self, ahead, count):
        return self.make(ahead, count)


@pytest.mark.parametrize(
    "options", [{**ENDING, "num_return_sequences": 2}, {"batch_size": 2, "do_sample": True, "repetition_penalty": 1.3}]
)
def test_an_answer_does_not_depend_on_who_guesses(options):
    model, options = near(), {"max_new_tokens": 10, **options}
    wanted, shown = generate(model, **options), []
    prompts = [prompt for prompt in PROMPTS for _ in range(options.get("num_return_sequences", 1))]
    texts = [
        [*prompt, *row[:n]] for prompt, row, n in zip(prompts, wanted.answers.tolist(), wanted.lengths, strict=True)
    ]

    def right(ahead, count):
        so_far = [tokens.tolist() for tokens in ahead.tokens]
        shown.extend(so_far)
        rest = [next(text[len(t) :] for text in texts if text[: len(t)] == t) for t in so_far]
        return torch.tensor([(row + [0] * count)[:count] for row in rest])

    def wrong(ahead, count):
        return (right(ahead, count) + 1) % 250

    def fewer(ahead, count):
        return right(ahead, count)[:, : len(shown) % 3]

    def mixed(ahead, count):
        tokens = torch.stack([ahead.pick(ahead.language_model()) for _ in range(min(2, count))], 1)
        ahead.tokens[0].fill_(7)  # a copy
        return torch.cat([tokens, right(ahead, count)[:, 2:]], 1)

    made = {}
    for make in (right, wrong, fewer, mixed, lambda ahead, count: torch.full((len(ahead.tokens), count), 10**9)):
        found = generate(model, speculate=4, drafter=Drafts(make=make), **options)
        check_equal(found, wanted)
        made[make] = found.guesses
    assert made[right][1] > 0.9 * made[right][0] > 0 == made[wrong][1] < made[wrong][0]
    assert min(made[fewer][1], made[mixed][1]) > 0
    check_equal(generate(model, speculate="auto", drafter="prompt_lookup", **options), wanted)


def test_an_answer_that_repeats_itself_is_looked_up_without_a_pass_of_the_language_model():
    model, read = near(), []
    extend = model.backbone.extend
    model.backbone.extend = lambda context, tokens: read.append(tokens.shape[1]) or extend(context, tokens)

    def three_in_turn(ids, scores):
        return scores.index_put((torch.arange(len(ids)), 60 + (ids[:, -1] + 1) % 3), torch.tensor(1e9))

    found = generate(
        model,
        PROMPTS[:1],
        max_new_tokens=30,
        speculate=4,
        drafter={"name": "prompt_lookup", "max_matching_ngram_size": 3},
        logits_processor=LogitsProcessorList([three_in_turn]),
    )
    assert found.answers[0, :6].tolist() == 2 * found.answers[0, :3].tolist()
    made, right = found.guesses
    assert made == right > 15
    assert len(read) < 30 / 3
    assert min(read[3:]) > 1


@pytest.mark.parametrize(
    "draft",
    [
        lambda ahead, count: torch.zeros(len(ahead.tokens), count),
        lambda ahead, count: torch.zeros(len(ahead.tokens), count + 1, dtype=torch.int64),
        lambda ahead, count: torch.zeros(len(ahead.tokens) + 1, count, dtype=torch.int64),
        lambda ahead, count: None,
    ],
)
def test_what_is_no_draft_is_refused_in_the_drafters_name(draft):
    with pytest.raises(PluginError, match=r"drafter 'drafts' drafted .* instead of int64 \(4, 2 or less\)"):
        generate(shared_lm(), speculate=2, drafter=Drafts(make=draft))


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        ("promt_lookup", "did you mean 'prompt_lookup'"),
        ({"name": "prompt_lookup", "max_matching_ngram_size": 0}, "max_matching_ngram_size"),
        (5, "drafter should be a name"),
        (ClassifierFree(), "drafter"),
    ],
)
def test_no_drafter_is_refused_by_name(drafter, message):
    with pytest.raises(L2DError, match=message):
        generate(shared_lm(), speculate=2, drafter=drafter)


def test_a_drafter_without_guesses_is_refused():
    with pytest.raises(ConfigError, match=r"'prompt_lookup' guesses nothing with speculate='off'"):
        generate(shared_lm(), drafter="prompt_lookup")


def growing(share):
    """Times of passes of which each further position takes so much of the first."""
    return lambda sizes: [1 + share * (size / sizes[0] - 1) for size in sizes]


def test_auto_guesses_further_where_guesses_are_free():
    counts = [Guesses(None, 3, growing(0.25), cost).count(30, 1) for cost in (0.0, 1.0)]
    assert counts[0] > counts[1] > 0


def test_auto_guesses_as_far_as_pays_however_passes_grow():
    def times(sizes):  # of a processor that takes three rows for three times one, and five for less than two
        return [{1: 1.0, 2: 1.6, 3: 3.1, 4: 2.9, 5: 1.7}.get(size // sizes[0], 1.9) for size in sizes]

    guesses, chosen = Guesses(None, 15, times), []
    while count := guesses.count(30, 1):
        chosen.append(count)
        guesses.learn(count, [0])
    assert {4} <= {*chosen} <= {1, 4, 8}
    assert Guesses(None, 15, times).count(3, 1) == 1
    assert Guesses(None, 15, growing(1.0)).count(30, 1) == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_auto_goes_by_what_passes_take_and_no_answer_does(monkeypatch, share):
    model, asked = near(scale=0.0), []

    def times(backbone, sizes):
        asked.append(sizes[0])
        return growing(share)(sizes)

    monkeypatch.setattr(speculation, "pass_times", times)
    for options in ({}, {**ENDING, "num_return_sequences": 2}):
        found = generate(model, speculate="auto", **options)
        check_equal(found, generate(model, **options))
        assert (found.guesses[1] > 0) == (share == 0)
    # Of how many rows: as they end, not every number of them is measured.
    assert {4, 8} <= {*asked} <= {1, 2, 4, 8}


def test_passes_are_measured_once_for_a_network_where_it_lies(monkeypatch):
    model, clock, sizes = near(), [0.0], []
    features = model.backbone.features

    def watched(h, *args, **options):
        sizes.append(h.shape[1])
        clock[0] += {1: 2.0, 3: 6.0, 5: 4.0}[h.shape[1]] + (5.0 if len(sizes) < 4 else 0.0)  # at first all is slow
        return features(h, *args, **options)

    model.backbone.features = watched
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for _ in range(2):
        assert pass_times(model.backbone, [1, 3, 5]) == [2.0, 6.0, 4.0]
        assert sorted(sizes) == sorted([1, 3, 5] * 3)
    assert pass_times(model.backbone, [1, 5]) == [2.0, 4.0]
    assert pass_times(model.to(torch.float64).backbone, [1]) == [2.0]
    assert len(sizes) == 9 + 6 + 3


def test_threads_that_ask_at_once_do_not_measure_one_another():
    model, passes, begun = near(), [], threading.Barrier(4)
    features = model.backbone.features

    def watched(h, *args, **options):
        passes.append(h.shape[1])
        return features(h, *args, **options)

    def ask(_):
        begun.wait()
        with torch.no_grad():
            return tuple(pass_times(model.backbone, [1, 2, 3]))

    model.backbone.features = watched
    with ThreadPoolExecutor(4) as pool:
        assert len({*pool.map(ask, range(4))}) == 1
    assert passes == [1, 2, 3] * 3


@pytest.mark.parametrize("family", PROVEN)
@torch.no_grad()
def test_passes_of_every_family_are_measured(family):
    assert min(pass_times(shared_lm(family).backbone, [1, 4])) > 0


def test_a_row_gains_whatever_its_batch_mates_do():
    model = near()
    alone = [generate(model, [prompt], speculate=4, max_new_tokens=30).guesses[1] for prompt in PROMPTS]
    # Less only where some row is so close to its end that none guesses far.
    assert 0.8 * sum(alone) < generate(model, speculate=4, max_new_tokens=30).guesses[1] <= sum(alone)


def test_where_both_paths_agree_every_guess_is_right_and_the_network_is_asked_less_often():
    model, calls = near(scale=0.0), []
    handle = model.backbone.shadows[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        wanted, sequential = generate(model), len(calls)
        found = generate(model, speculate=4)
    finally:
        handle.remove()
    check_equal(found, wanted)
    assert found.guesses[0] == found.guesses[1] > 0
    assert 4 * (len(calls) - sequential) < 1.3 * sequential


def test_a_guidance_that_reads_the_sequence_is_served_token_by_token():
    model = near()
    with installed(*entry_points(group=GROUP), plugin("recalling", [toys.Recalling])):
        found = generate(model, speculate=3, guidance=[toys.Recalling()])
        check_equal(found, generate(model, guidance=[toys.Recalling()]))
    assert found.guesses == (0, 0)


def test_criteria_and_streamer_meet_the_same_tokens_in_the_same_order():
    class Tokens(BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    model, met = near(), {}
    for speculate in ("off", 4):
        lengths, streamer = [], Tokens()

        def judge(ids, scores, lengths=lengths):
            lengths.append(ids.shape[1])
            return torch.zeros(len(ids), dtype=torch.bool)

        generate(
            model, PROMPTS[:1], speculate=speculate, streamer=streamer, stopping_criteria=StoppingCriteriaList([judge])
        )
        met[speculate] = lengths, streamer.seen
    assert met["off"] == met[4]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_inference_steps": 0}, "without evaluations"),
        ({"patience": 2, "num_inference_steps": 5}, "patience"),
        ({"observer": lambda evaluation: None}, "observer"),
    ],
)
def test_what_looks_at_one_token_after_the_other_is_refused_a_number_and_left_alone_by_auto(options, why):
    model = shared_lm()
    with pytest.raises(ConfigError, match=why):
        generate(model, speculate=2, **options)
    found = generate(model, speculate="auto", **options)
    check_equal(found, generate(model, **options))
    assert found.guesses == (0, 0)


def test_a_model_that_denoises_tokens_together_is_refused_a_number():
    model = tess_lm()
    with pytest.raises(ConfigError, match=r"speculate=2 .*several tokens together"):
        generate(model, max_new_tokens=4, speculate=2)


@pytest.mark.parametrize("speculate", [0, -1, 1.5, True, "always", None])
def test_other_values_are_refused_by_name(speculate):
    with pytest.raises(ConfigError, match="speculate"):
        generate(shared_lm(), speculate=speculate)


def test_auto_tries_again_after_a_while():
    guesses = Guesses(None, 3, growing(0.25))
    while guesses.count(8, 1):
        guesses.learn(4, [0])
    waits = next(number for number in range(1, 1000) if guesses.count(8, 1))
    assert waits > 5


def test_auto_guesses_further_where_guesses_are_right():
    def most(scale):
        model, lengths = near(scale=scale), []
        extend = model.backbone.extend
        model.backbone.extend = lambda context, tokens: lengths.append(tokens.shape[1]) or extend(context, tokens)
        generate(model, PROMPTS[:1], speculate="auto", num_inference_steps=15, max_new_tokens=40)
        middle = len(lengths) // 2
        return max(lengths[middle : middle + 8])

    assert most(0.0) > 2 >= most(3.0)  # a single guess now and then


def test_a_watermark_that_remembers_is_written_token_by_token():
    mark = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    with pytest.raises(ConfigError, match="watermark"):
        generate(shared_lm(), speculate=2, do_sample=True, watermarking_config=mark)
    assert generate(near(), speculate="auto", do_sample=True, watermarking_config=mark).guesses == (0, 0)
