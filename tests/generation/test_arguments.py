"""What a request may say: a solver brings its own steps, and whatever is wrong is named before anything runs."""

import contextlib
import json
import re
import warnings
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusion_models import diffusion_lm, shared_lm, shared_tess
from transformers import GenerationConfig, LogitsProcessor, WatermarkingConfig
from transformers.generation.streamers import BaseStreamer
from typing_extensions import override

from l2d_framework.config import SamplingSection, default_sampling
from l2d_framework.config.sampling import with_preset
from l2d_framework.diffusion.sampling import check_sampling
from l2d_framework.errors import ConfigError, L2DError, PluginError
from l2d_framework.generation.arguments import _UNSERVED, _WITHOUT_EFFECT, DecodingOptions, check_gapped
from l2d_framework.generation.prompts import Encoded, pad_left
from l2d_framework.guidance import Guidance
from l2d_framework.registry import registry
from l2d_framework.types import Layout
from l2d_plugins.drafters.prompt_lookup import PromptLookup
from l2d_plugins.guidance.classifier_free import ClassifierFree
from l2d_plugins.parametrizations.embedding import EmbeddingConfig
from l2d_plugins.solvers.runge_kutta import Euler

NAN, INF = float("nan"), float("inf")
HUGE = 10**9
SPACE = EmbeddingConfig()
L2D_PRESETS = ["l2d-paper", "l2d-release", "l2d-adaptive"]
SOLVERS: Any = {
    name: solver for name, solver in registry().components("solver").items() if not solver.missing_requirements()
}
ADAPTIVE = [name for name, solver in SOLVERS.items() if solver.is_adaptive]
FIXED = [name for name in SOLVERS if name not in ADAPTIVE]


def model():
    return shared_lm(classes=("a", "b"), tokenizer=True)


def requested(preset: str, **options: Any) -> SamplingSection:
    """A model trained with a preset, asked with options."""
    return default_sampling(SPACE).resolve(SPACE, {"preset": preset}).resolve(SPACE, options)


WAYS: dict[str, Any] = {
    "of the model": requested,
    "of the request": lambda preset, **options: default_sampling(SPACE).resolve(SPACE, {"preset": preset} | options),
    "of a run file": lambda preset, **options: default_sampling(SPACE).resolve(
        SPACE, with_preset({**options, "solver": {"name": options["solver"]}, "preset": preset}, None)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("preset", L2D_PRESETS)
def test_an_adaptive_solver_takes_no_number_of_steps_from_a_preset(preset, solver, way):
    found = WAYS[way](preset, solver=solver)
    assert found.num_inference_steps is None
    assert found.solver == SOLVERS[solver]()
    assert WAYS[way](preset, solver=solver, num_inference_steps=33).num_inference_steps == 33


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_fixed_solver_takes_no_budget_for_its_number_of_steps(solver):
    model = default_sampling(SPACE).resolve(SPACE, {"solver": solver, "num_inference_steps": 900})
    with pytest.raises(ConfigError, match="needs a number, got None"):
        model.resolve(SPACE, {"solver": "euler"})
    assert model.resolve(SPACE, {"solver": "euler", "num_inference_steps": 9}).num_inference_steps == 9
    assert model.resolve(SPACE, {"seed": 3}).num_inference_steps == 900


def test_solvers_of_one_kind_share_their_number_of_steps():
    assert requested("l2d-paper", solver="euler").num_inference_steps == 15
    assert requested("l2d-paper", solver={"name": "midpoint"}).num_inference_steps == 15


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("inherited", [{"patience": 3}, {"end_time": 1.0}, {"patience": 3, "end_time": 1.0}])
def test_a_solver_is_not_refused_for_what_the_request_does_not_say(solver, inherited):
    model = default_sampling(SPACE).resolve(SPACE, {"solver": "renoise", "num_inference_steps": 13} | inherited)
    found = model.resolve(SPACE, {"solver": solver})
    check_sampling(found, num_classes=0, has_condition=False)
    for name, value in inherited.items():
        with_it = {"num_inference_steps": found.num_inference_steps, name: value}
        try:
            check_sampling(found.model_copy(update=with_it), num_classes=0, has_condition=False)
        except ConfigError:
            assert getattr(found, name) is None
        else:
            assert getattr(found, name) == value


def test_the_readmes_adaptive_solver_generates_under_the_papers_preset():
    lm = diffusion_lm()
    lm.origin = type(lm.origin)(sampling=requested("l2d-paper"))
    found = lm.generate(torch.tensor([[9, 30, 71]]), solver="fehlberg2", max_new_tokens=2, eos_token_id=None)
    assert int(found.evaluations.max()) > 15


class Mine(SOLVERS["midpoint"]):
    """No plugin offers it, and it has the name of one that a plugin does."""


class Unknown(Mine):
    name: Literal["unknown"] = "unknown"


class Watched(Guidance):
    name: Literal["watched"] = "watched"

    @override
    def __call__(self, predict, query, space):
        return predict(query)


@pytest.mark.parametrize("own", [Mine(), Unknown()])
def test_instances_are_taken_as_they_are_though_no_plugin_offers_their_classes(own):
    mixed = [Watched(), {"name": "classifier_free", "scale": 2.0}]
    found = requested("l2d-paper", solver=own, guidance=mixed)
    assert found.solver is own
    assert found.guidance[0] is mixed[0]
    assert found.guidance[1:] == requested("l2d-paper", guidance=mixed[1:]).guidance
    assert found.num_inference_steps == 15
    later = found.resolve(SPACE, {"seed": 3})
    assert later.solver is own and later == found.model_copy(update={"seed": 3})
    asked = {"max_new_tokens": 2, "num_inference_steps": 5}
    lm = shared_lm()
    ours, theirs = (lm.generate(torch.tensor([[9, 30]]), solver=s, **asked) for s in (own, "midpoint"))
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("own", [Mine(), Unknown()])
def test_an_instance_leaves_to_the_next_solver_what_one_that_a_plugin_offers_leaves(own):
    found = requested("l2d-paper", solver=own, patience=3)
    assert found.resolve(SPACE, {"solver": "fehlberg2"}) == requested("l2d-paper", solver="fehlberg2")
    assert found.resolve(SPACE, {"solver": "euler"}) == requested("l2d-paper", solver="euler", patience=3)


class Stepping(SOLVERS["fehlberg2"]):
    name: Literal["stepping"] = "stepping"


def test_fields_are_laid_over_an_instance_that_no_plugin_offers():
    model = requested("l2d-adaptive", solver=Stepping(atol=0.5))
    changed = model.resolve(SPACE, {"solver": {"rtol": 0.25}})
    assert changed.solver == Stepping(atol=0.5, rtol=0.25)
    assert changed == model.model_copy(update={"solver": changed.solver})
    with pytest.raises(ConfigError, match=r"^sampling.solver.rtoll: unknown field, got 1; did you mean 'rtol'"):
        model.resolve(SPACE, {"solver": {"rtoll": 1}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"solver": Stepping}, r"^solver should be .* got the class Stepping; pass Stepping\(\.\.\.\)"),
        ({"guidance": [Watched]}, r"^guidance should be .* got the class Watched; pass Watched\(\.\.\.\)"),
        ({"drafter": PromptLookup}, r"^drafter should be .* got the class PromptLookup; pass PromptLookup\("),
        ({"solver": Watched()}, r"^solver should be a component of this kind, got Watched\(.*, a guidance"),
        ({"drafter": Watched()}, r"^drafter should be a component of this kind, got Watched\(.*, a guidance"),
        *(
            ({"guidance": one}, r"guidance: should be a list, got .*watched.*; put it into one")
            for one in (Watched(), "watched", {"name": "watched"})
        ),
        *(
            (options, r"Unknown .* 'mine'.* Install the plugin .*`generate` takes an object of its class, too")
            for options in (
                {"solver": "mine"},
                {"solver": {"name": "mine", "rtol": 0.5}},
                {"guidance": ["mine"]},
                {"drafter": "mine"},
            )
        ),
        ({"preset": "mine"}, "Unknown preset 'mine'.* Install the plugin that offers it.$"),
    ],
)
def test_what_is_no_component_is_refused_with_what_to_give_instead(options, said):
    with pytest.raises((ConfigError, PluginError), match=said):
        shared_lm().generate(torch.tensor([[9, 30]]), max_new_tokens=1, **{"speculate": 2, **options})


class Swallow(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


class Same(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


REFUSED = [
    *(("max_new_tokens", value) for value in (0, -1, "2", 1.5, True, [2])),
    *(("max_length", value) for value in (0, "30", 2.5)),
    *(("min_new_tokens", value) for value in (-1, "1", 0.5)),
    *(("stop_strings", value) for value in ([], "", ["a", ""], 3, [3], {"a"})),
    *(("pad_token_id", value) for value in (HUGE, -1, "0", 1.0)),
    *(("eos_token_id", value) for value in (HUGE, -2, [], [1, HUGE], "2", 2.0)),
    *(("bos_token_id", value) for value in (HUGE, -1)),
    *(("forced_eos_token_id", value) for value in (HUGE, [], [HUGE], -1)),
    *(("forced_bos_token_id", value) for value in (HUGE, -1, [1])),
    *(("bad_words_ids", value) for value in ([], [1], [[]], [[1, HUGE]], "ab")),
    *(("suppress_tokens", value) for value in (5, [HUGE], ["a"], [-1])),
    *(("begin_suppress_tokens", value) for value in (5, [HUGE])),
    *(("sequence_bias", value) for value in ({(1, HUGE): 2.0}, {(1,): NAN}, [[[], 1.0]], 3)),
    *(("temperature", value) for value in (-1.0, NAN, INF, "1", True)),
    *(("top_p", value) for value in (-0.1, 1.1, NAN, "0.5")),
    *(("min_p", value) for value in (-0.1, 1.1, NAN)),
    *(("typical_p", value) for value in (0, 1.1, NAN)),
    *(("epsilon_cutoff", value) for value in (-0.1, 1.0, NAN)),
    *(("eta_cutoff", value) for value in (-0.1, 1.0, NAN)),
    *(("top_k", value) for value in (-1, 1.5, "5", True)),
    *(("repetition_penalty", value) for value in (0, -1.0, NAN, INF)),
    *(("no_repeat_ngram_size", value) for value in (-1, 1.5)),
    *(("exponential_decay_length_penalty", value) for value in ((1,), (1, NAN), (-1, 1.1), 3)),
    *(("max_time", value) for value in (0, -1, NAN, "1")),
    *(("do_sample", value) for value in ("yes", 2, 0.5)),
    *((name, value) for name in ("num_beams", "num_beam_groups") for value in (0, 2, -1, "1")),
    *(("num_return_sequences", value) for value in (0, -1, "2", 1.5, True, None)),
    *(("penalty_alpha", value) for value in (0.6,)),
    *(("prompt_lookup_num_tokens", value) for value in (3,)),
    *(("assistant_model", value) for value in ("gpt2", {"name": "assistant"})),
    *(("output_scores", value) for value in (True, "yes")),
    *(("return_dict_in_generate", value) for value in (True,)),
    *(("guidance_scale", value) for value in (NAN, INF, "2", True, [1.0, NAN], ["1"], {1.0}, [])),
    *(("classes", value) for value in ("a", ["c"], [1], {"a"}, ["a", "b"], [["a"]])),
    *(("seed", value) for value in (-1, "12", 1.5, True, [1, -1], [1.5], ["1"], [True], {1}, [1, 2])),
    *(("num_inference_steps", value) for value in (-1, "15", 1.5, True, 10**12, torch.ones(2))),
    *(("patience", value) for value in (0, "1", 2**70)),
    *(("end_time", value) for value in (0, 2, NAN, "1")),
    *(("block_size", value) for value in (0, 2, "1", 10**12)),
    *(
        ("solver", value)
        for value in (5, Euler, {"name": 5}, {"name": ["euler"]}, {"name": "midpoint", "x": 1}, object())
    ),
    *(("guidance", value) for value in (5, "classifier_free", [5], [{"name": "classifier_free", "scale": NAN}], len)),
    *(("estimate", value) for value in (5, {"mode": 3}, {"x": object()}, [1])),
    *(("preset", value) for value in (5, ["l2d-paper"], "l2d", True)),
    *(
        ("generation_config", value)
        for value in ({}, 5, GenerationConfig(pad_token_id=HUGE), GenerationConfig(num_beams=3))
    ),
    *(("generation_config", GenerationConfig(guidance_scale=3.0)) for _ in range(1)),
    *(("logits_processor", value) for value in (5, [5], "a", Same())),
    *(("stopping_criteria", value) for value in (5, [5], len)),
    *(("streamer", value) for value in (5, len)),
    *(("observer", value) for value in (5, "a")),
]
"""Arguments of `generate` with values that cannot be meant."""


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network ran")

    for lm in (model(), shared_tess(tokenizer=True)):
        monkeypatch.setattr(type(lm.backbone), "read", refuse)


def named(value):
    """The beginning of a value, without addresses, which every worker of pytest would spell in its own way."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:30]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=named)
def test_a_wrong_argument_is_named_before_anything_runs(nothing_runs, name, value):
    options = {
        "max_new_tokens": 2,
        "num_inference_steps": 3,
        **({"classes": ["a"]} if name == "guidance_scale" else {}),
    }
    with pytest.raises(L2DError) as caught:
        model().generate("ab", **(options | {name: value}))
    assert name[:5] in str(caught.value)


def test_a_temperature_of_zero_is_greedy_and_no_way_to_sample():
    plain, cold = (
        model().generate("ab", max_new_tokens=3, num_inference_steps=3, **o) for o in ({}, {"temperature": 0})
    )
    assert plain.sequences.tolist() == cold.sequences.tolist()
    with pytest.raises(ConfigError, match=r"temperature should be greater than 0 to sample"):
        model().generate("ab", max_new_tokens=3, num_inference_steps=3, temperature=0.0, do_sample=True)


IDS = torch.tensor([[5, 6, 7]])
ONES = torch.ones_like(IDS)
NO_PROMPTS = [
    *(5, None, b"ab", [], [5], [None], [b"a"], [[1, 2]], [["ab"]], {"role": "user", "content": "a"}, iter(["a"]), ""),
    *(IDS[0], IDS[:, :0], IDS[:0], IDS.float(), IDS > 5, IDS - 9, IDS + HUGE, torch.ones(1, 2, 3, dtype=torch.int64)),
    *(Encoded(IDS, ONES[:, :2]), Encoded(IDS, 0 * ONES), Encoded(IDS, torch.tensor([[1, 1, 0]]))),
    *(Encoded(IDS, torch.tensor([[1, 0, 1]])), Encoded(IDS, 2 * ONES), Encoded(IDS + HUGE, ONES)),
    Encoded(IDS, ONES, keys=["a", "b"]),
]


@pytest.mark.parametrize("prompts", NO_PROMPTS, ids=named)
def test_what_is_no_prompt_is_refused_before_anything_runs(nothing_runs, prompts):
    with pytest.raises(ConfigError):
        model().generate(prompts, max_new_tokens=2, num_inference_steps=3)


@pytest.mark.parametrize(
    "options",
    [
        {"watermarking_config": 3},
        {"watermarking_config": {"bias": 1.0}},
        {"max_length": 2, "max_new_tokens": None},
    ],
)
def test_what_transformers_refuses_itself_is_passed_on(options):
    with pytest.raises(ConfigError, match="transformers refuses these generation settings"):
        model().generate(IDS, **({"max_new_tokens": 2, "num_inference_steps": 3} | options))


def test_an_error_of_a_callback_is_not_taken_for_a_setting():
    def observe(evaluation):
        raise ValueError("of the user")

    with pytest.raises(ValueError, match=r"^of the user$") as caught:
        model().generate(IDS, max_new_tokens=2, num_inference_steps=3, observer=observe)
    assert not isinstance(caught.value, L2DError)


def test_good_arguments_are_taken_in_any_form():
    lm, how = model(), {"num_inference_steps": 3, "max_new_tokens": 3, "eos_token_id": None}
    wanted = lm.generate(IDS, classes=["a"], guidance_scale=2.0, seed=4, suppress_tokens=[8, 9], **how).answers
    again = lm.generate(
        IDS.int(),
        classes=("a",),
        guidance_scale=np.float32(2),
        seed=torch.tensor(4),
        suppress_tokens=np.array([8, 9]),
        pad_token_id=np.int64(0),
        num_return_sequences=np.int64(1),
        streamer=Swallow(),
        logits_processor=[Same()],
        watermarking_config=WatermarkingConfig(bias=0.0),
        end_time=np.float64(1.0),
        **how,
    ).answers
    assert torch.equal(again, wanted)
    biased = [lm.generate(IDS, sequence_bias={(kind(7),): 90.0}, **how).answers.tolist() for kind in (int, np.int64)]
    assert biased == [[[7, 7, 7]]] * 2


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_a_configuration_may_name_its_ends_in_any_form(kind):
    config = GenerationConfig(eos_token_id=kind([7, 8]))
    found = model().generate(IDS, generation_config=config, sequence_bias={(8,): 90.0}, max_new_tokens=3)
    assert found.answers.tolist() == [[8]]


@pytest.mark.parametrize("name", sorted({*GenerationConfig().to_dict()} - {*_WITHOUT_EFFECT}))
def test_no_field_of_a_generation_config_ends_in_a_foreign_error(name):
    lm = model()
    for value in (1, NAN, HUGE, [[1]], object()):
        with warnings.catch_warnings(), contextlib.suppress(L2DError):
            warnings.simplefilter("ignore")
            lm.generate(IDS, **{"max_new_tokens": 1, "num_inference_steps": 0, name: value})


def test_every_served_field_is_one_of_transformers_and_stands_in_one_list():
    fields = set(GenerationConfig().to_dict())
    lists = [set(DecodingOptions.model_fields), set(_UNSERVED), set(_WITHOUT_EFFECT)]
    assert sum(map(len, lists)) == len(set.union(*lists))
    assert {"max_new_tokens", "eos_token_id", "pad_token_id", "temperature", "num_beams", "use_cache"} <= fields


def with_base(**settings: Any):
    lm = diffusion_lm()
    for name, value in settings.items():
        setattr(lm.backbone.lm.generation_config, name, value)
    return lm


@pytest.mark.parametrize(
    ("name", "value"), [("num_beams", 4), ("num_return_sequences", 3), ("pad_token_id", -1), ("penalty_alpha", 0.6)]
)
def test_what_a_base_models_configuration_cannot_mean_here_is_left_out_with_a_warning(name, value):
    how = {"max_new_tokens": 3, "num_inference_steps": 3, "eos_token_id": None}
    wanted = diffusion_lm().generate(IDS, **how).sequences
    with pytest.warns(UserWarning, match=f"Left out of the base model's generation_config: {name}"):
        found = with_base(**{name: value}).generate(IDS, **how).sequences
    assert torch.equal(found, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_base(num_beams=1, num_return_sequences=1).generate(IDS, **how)


def test_settings_of_a_base_model_that_change_no_token_are_passed_over():
    how = {"max_new_tokens": 3, "num_inference_steps": 3, "eos_token_id": None}
    lm = with_base(cache_implementation="static", use_cache=False, length_penalty=2.0, early_stopping=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(lm.generate(IDS, **how).sequences, diffusion_lm().generate(IDS, **how).sequences)


def test_a_base_models_own_settings_for_picking_still_count():
    how = {"max_new_tokens": 4, "num_inference_steps": 3, "eos_token_id": None}
    first = int(diffusion_lm().generate(IDS, **how).answers[0, 0])
    lm = with_base(suppress_tokens=[first], max_length=2)
    assert int(lm.generate(IDS, **how).answers[0, 0]) != first
    assert int(lm.generate(IDS, suppress_tokens=None, **how).answers[0, 0]) == first


@pytest.mark.parametrize(
    "options",
    [
        *({"texts": texts} for texts in (5, [], [5], None, "no gap", b"<mask:2>", "<mask:0>", f"a<mask:{HUGE}>")),
        *({"seed": seed} for seed in (-1, "1", [1, 2], 1.5)),
        *({"solver": 5}, {"guidance": [5]}, {"end_time": NAN}, {"observer": 5}, {"max_new_tokens": 3}, {"preset": 5}),
    ],
    ids=str,
)
def test_infilling_refuses_wrong_arguments_before_anything_runs(nothing_runs, options):
    given = {"num_inference_steps": 2, "texts": "a <mask:2> b"} | options
    with pytest.raises(ConfigError):
        shared_tess(tokenizer=True).infill(given.pop("texts"), **given)


@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [
        (IDS, 0 * ONES),
        (IDS, torch.tensor([[1, 0, 0]])),
        (IDS, torch.tensor([[0, 1, -1]])),
        (IDS, torch.tensor([[0, 1]])),
        (IDS.float(), torch.tensor([[0, 1, 0]])),
        (IDS + HUGE, torch.tensor([[0, 1, 0]])),
        (IDS[0], torch.tensor([0, 1, 0])),
        (IDS.repeat(1, 50), torch.tensor([[0, 1, 0]]).repeat(1, 50)),
    ],
)
def test_infilling_refuses_batches_without_sound_gaps(nothing_runs, tokens, blocks):
    with pytest.raises(ConfigError):
        shared_tess(tokenizer=True).infill(Layout(tokens, blocks), num_inference_steps=2)
    check_gapped(Layout(IDS, torch.tensor([[-1, 0, 1]])), 300, None)


@pytest.mark.parametrize(
    "options",
    [
        *({"guidance_scale": value, "class_name": "a"} for value in (NAN, INF, "2", [1.0])),
        *({"class_name": value} for value in ("c", 5, ["a"])),
        *({"seed": [1, 2]}, {"solver": 5}, {"max_new_tokens": 3}, {"num_inference_steps": 1.5}, {"end_time": NAN}),
    ],
    ids=str,
)
def test_as_transformers_refuses_wrong_arguments(options):
    with pytest.raises(L2DError):
        model().as_transformers(**({"num_inference_steps": 3} | options))


def test_the_first_of_equal_prompts_is_the_one_alone_and_the_second_has_other_noise():
    seen: list[torch.Tensor] = []
    batch = pad_left([[9, 30], [9, 30]])
    model().generate(batch, max_new_tokens=1, num_inference_steps=1, end_time=0.5, observer=lambda e: seen.append(e.x))
    model().generate(
        IDS[:, :0].new_tensor([[9, 30]]),
        max_new_tokens=1,
        num_inference_steps=1,
        end_time=0.5,
        observer=lambda e: seen.append(e.x),
    )
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[0][0])


def test_numbers_of_components_are_finite():
    for section in ({"name": "classifier_free", "scale": NAN}, {"name": "classifier_free", "scale": INF}):
        with pytest.raises(ConfigError, match="finite"):
            registry().create("guidance", section)
    assert json.loads(ClassifierFree(scale=2.0).model_dump_json())["scale"] == 2.0
