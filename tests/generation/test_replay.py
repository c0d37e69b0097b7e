"""Tokens replayed from a graph are the tokens of the plain path."""

import gc
import warnings
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Literal

import pytest
import torch
import toy_components as toys
from diffusion_models import diffusion_lm, shared_lm
from fake_plugins import installed, plugin
from tape_graph import TapeGraph
from tiny_models import tiny_lm

from l2d_framework.diffusion.ode import TokenODE
from l2d_framework.errors import PluginError
from l2d_framework.generation import replay, replay_evaluations
from l2d_framework.generation.prompts import pad_left
from l2d_framework.guidance import Guidance
from l2d_framework.hooks import GROUP
from l2d_framework.types import Prediction
from l2d_plugins.backbones import compiling
from l2d_plugins.guidance.classifier_free import ClassifierFree

PROMPTS = [[9, 30, 71, 100, 42, 17, 201], [55, 44], [120, 9, 8, 7], [55, 44, 200, 13, 99]]
FULL_ATTENTION = ["llama", "qwen2", "qwen3", "smollm3", "phi3", "olmo2"]
ADAPTIVE = {
    "solver": {"name": "fehlberg2", "rtol": 1e-3, "atol": 1e-3},
    "num_inference_steps": None,
    "max_new_tokens": 4,
}
ENDING = {"eos_token_id": [*range(60, 72)], "do_sample": True, "max_new_tokens": 24}


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that is made."""
    made = []

    def make(device):
        made.append(TapeGraph())
        return made[-1]

    monkeypatch.setitem(replay.GRAPHS, "cpu", make)
    return made


def generate(model, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 12, "num_inference_steps": 5, "eos_token_id": None, **options}
    return model.generate(pad_left(prompts), **options)


def check_replays(model, graphs, **options):
    wanted = generate(model, graph=False, **options)
    assert not graphs
    found = generate(model, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.evaluations, wanted.evaluations)
    assert torch.equal(found.lengths, wanted.lengths)
    assert any(graph.made is not None for graph in graphs)
    for name, values in wanted.metrics.items():
        assert torch.equal(found.metrics[name].nan_to_num(7.0), values.nan_to_num(7.0))


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_replayed_tokens_are_those_of_the_plain_path(family, graphs):
    check_replays(shared_lm(family), graphs)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7},
        {"estimate": {"mode": "average"}, "solver": "rk4"},
        {"estimate": {"mode": "argmax"}, "solver": "euler"},
        {"num_return_sequences": 2, "repetition_penalty": 1.3},
        {"num_inference_steps": 1},
        ENDING,
        ADAPTIVE,
        {**ADAPTIVE, "estimate": {"mode": "average"}},
        ADAPTIVE | {"solver": {"name": "torchdiffeq_adaptive", "method": "adaptive_heun", "rtol": 0.5, "atol": 0.5}},
        ADAPTIVE | ENDING | {"max_new_tokens": 8, "eos_token_id": [*range(40, 100)]},
    ],
)
def test_they_are_with_every_option(options, graphs):
    check_replays(shared_lm(), graphs, **options)


@pytest.mark.parametrize("options", [ENDING, {**ADAPTIVE, "guidance_scale": [1.5, 0.5, 1.5, 2.0]}])
def test_they_are_with_classes_and_guidance(options, graphs):
    model = shared_lm(classes=("a", "b"))
    check_replays(model, graphs, classes=["a", None, "b", "a"], guidance=[ClassifierFree(scale=1.5)], **options)


@pytest.mark.parametrize("remembers", [{"space": {"self_conditioning": "add"}}, {"carry": True}])
def test_they_are_where_an_evaluation_goes_on_from_the_one_before(remembers, graphs):
    check_replays(diffusion_lm(**remembers), graphs, **ADAPTIVE)


def test_a_replayed_slope_is_that_of_the_same_work_done_anew(monkeypatch):
    slopes = {}
    for kind in (TapeGraph, lambda: lambda work: work()):
        seen = slopes[kind] = []
        velocity = TokenODE.velocity

        def noted(*args, velocity=velocity, seen=seen, **options):
            seen.append(velocity(*args, **options))
            return seen[-1]

        with monkeypatch.context() as patch:
            patch.setattr(TokenODE, "velocity", noted)
            patch.setitem(replay.GRAPHS, "cpu", lambda device, kind=kind: kind())
            found = generate(shared_lm(), **ADAPTIVE)
    assert len(found.evaluations.unique()) > 1
    assert all(torch.equal(*pair) for pair in zip(*slopes.values(), strict=True))


def test_evaluations_are_captured_once_for_each_power_of_two_of_rows(graphs):
    prompts = [*PROMPTS, *([number] for number in (3, 4, 5))]
    generate(shared_lm(), prompts, **ADAPTIVE | {"max_new_tokens": 8})
    # The language model's step; both ends of a solve; between them at most 8, 4, 2 rows and one, of which 3 are copied.
    assert 1 + 2 < sum(graph.made is not None for graph in graphs) <= 1 + 2 + 4 + 3


def test_they_are_over_a_model_that_takes_masks_of_numbers(graphs):
    check_replays(diffusion_lm(tiny_lm(attn_implementation="eager")), graphs)


def test_rows_that_have_ended_run_along_until_half_of_them_have(graphs):
    check_replays(shared_lm(), graphs, **ENDING)
    sizes = [len(graph.made.evaluations) for graph in graphs if graph.made is not None]
    assert sizes[0] == len(PROMPTS)
    assert len(sizes) > 1
    assert all(2 * small <= large for large, small in pairwise(sizes))


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 2},
        {"num_inference_steps": 0},
        {"speculate": 2},
        {"observer": lambda evaluation: None},
        {"graph": False},
    ],
)
def test_steps_that_differ_from_token_to_token_are_not_captured(options, graphs):
    generate(shared_lm(), **options)
    assert not graphs


def test_a_window_narrower_than_the_text_is_not_captured(graphs):
    generate(shared_lm("mistral"))
    assert not graphs


class Asking(Guidance):
    """Looks at numbers on the host."""

    name: Literal["asking"] = "asking"

    def __call__(self, predict, query, space):
        plain = predict(query)
        return Prediction(plain.logits * (1.5 if float(plain.logits.sum()) > 0 else 1.0))


class Counting(Guidance):
    """Does more at later evaluations."""

    name: Literal["counting"] = "counting"

    def __call__(self, predict, query, space):
        plain = predict(query)
        return Prediction(plain.logits * (1 + 0.5 * space.evaluation))


@pytest.mark.parametrize(
    ("guidance", "warned", "solve"),
    [(toys.Recalling, 0, {}), (Asking, 1, {}), (Counting, 0, ADAPTIVE), (Asking, 1, ADAPTIVE)],
)
def test_a_guidance_that_cannot_be_captured_is_served_without(guidance, warned, solve, graphs):
    model = shared_lm()
    with (
        installed(*entry_points(group=GROUP), plugin("more", [guidance])),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        found = generate(model, guidance=[guidance(scale=1 + len(solve))], **solve)
        assert len([w for w in seen if "not replayed" in str(w.message)]) == warned
        wanted = generate(model, guidance=[guidance(scale=1 + len(solve))], graph=False, **solve)
    assert torch.equal(found.sequences, wanted.sequences)


@pytest.mark.parametrize(
    ("kind", "name", "wrong", "options"),
    [
        (replay._Tape, "fill", lambda *_: None, {}),
        (replay_evaluations._Evaluation, "fill", lambda *_: None, ADAPTIVE),
    ],
)
def test_a_replay_of_other_numbers_would_be_noticed(kind, name, wrong, options, graphs, monkeypatch):
    monkeypatch.setattr(kind, name, wrong)
    with pytest.raises(AssertionError):
        check_replays(shared_lm(), graphs, **options)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_a_failed_capture_is_remembered_of_its_kind_of_rows_alone_and_unless_memory_was_out(error, graphs, monkeypatch):
    def fail(work):
        raise error  # made anew, since an error keeps what was at work

    model = diffusion_lm()
    with monkeypatch.context() as patch:
        patch.setitem(replay.GRAPHS, "cpu", lambda device: fail)
        with pytest.warns(UserWarning, match="not replayed"):
            generate(model, **ADAPTIVE)
    check_replays(model, graphs)
    graphs.clear()
    generate(model, **ADAPTIVE)
    assert bool(graphs) is (error is torch.OutOfMemoryError)


def test_a_failed_capture_of_compiled_layers_says_nothing_of_layers_as_they_are(graphs, monkeypatch):
    def fail(work):
        raise RuntimeError

    monkeypatch.setattr(compiling.Compiled, "__call__", lambda _, *given: compiling.run(*given[:4]))
    model = diffusion_lm()
    with monkeypatch.context() as patch:
        patch.setitem(replay.GRAPHS, "cpu", lambda device: fail)
        with pytest.warns(UserWarning, match="not replayed"):
            generate(model, compile=True)
    generate(model, compile=True)
    assert not graphs
    generate(model)
    assert graphs


def test_room_for_an_answer_is_made_in_steps(graphs, monkeypatch):
    monkeypatch.setattr(replay, "_STEP", 3)
    check_replays(shared_lm(), graphs, max_new_tokens=30)
    assert len(graphs) > 2


def test_there_is_room_for_a_long_answer_though_nothing_could_be_captured(graphs, monkeypatch):
    monkeypatch.setattr(replay, "_STEP", 3)
    model = shared_lm()
    with installed(*entry_points(group=GROUP), plugin("more", [toys.Recalling, Asking])):
        for guidance in (toys.Recalling(), Asking()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = generate(model, guidance=[guidance])
            assert torch.equal(found.sequences, generate(model, guidance=[guidance], graph=False).sequences)


@pytest.fixture
def undone(monkeypatch):
    """Graphs that do their work each time, and keep nothing."""
    monkeypatch.setitem(replay.GRAPHS, "cpu", lambda device: lambda work: work())


@pytest.mark.parametrize("options", [{}, ADAPTIVE])
def test_nothing_is_left_of_keys_and_values(options, undone):
    gc.collect()
    gc.disable()
    try:
        generate(shared_lm(), **options)
        assert not [kept for kept in gc.get_objects() if type(kept).__name__ == "_Slots"]
    finally:
        gc.enable()


class Breaking(Guidance):
    """Fails behind some slot."""

    name: Literal["breaking"] = "breaking"

    def __call__(self, predict, query, space):
        plain = predict(query)
        return Prediction(plain.logits.masked_fill((query.positions > 11)[..., None], torch.nan))


@pytest.mark.parametrize("options", [{}, {**ADAPTIVE, "max_new_tokens": 8}])
def test_a_guidance_that_breaks_is_named_though_rows_have_ended(options, undone):
    ends = {"eos_token_id": generate(shared_lm()).answers[0, 1].tolist()}
    with (
        installed(*entry_points(group=GROUP), plugin("more", [Breaking])),
        pytest.raises(PluginError, match="breaking"),
    ):
        generate(shared_lm(), guidance=[Breaking()], **ends, **options)
