import pytest

from l2d_framework.config import config_hash, parse_run
from l2d_framework.parametrization import merge_estimate
from l2d_plugins.guidance import l2d_components as guidance
from l2d_plugins.parametrizations.embedding import EmbeddingConfig
from l2d_plugins.presets import l2d_presets
from l2d_plugins.solvers import l2d_components as solvers

CLASSES = {c.component_name(): c for c in [*guidance(), *solvers()]}


def build(section):
    return CLASSES[section["name"]](**section)


@pytest.mark.parametrize("name", ["l2d-paper", "l2d-release", "l2d-release-coding", "l2d-adaptive"])
@pytest.mark.parametrize("temperature", [{"name": "constant", "value": 0.7}, {"name": "polynomial", "power": 2.0}])
def test_every_preset_builds_whatever_the_model_was_saved_with(name, temperature):
    preset = l2d_presets()[name]
    assert build(preset["solver"]).component_name() == preset["solver"]["name"]
    assert [build(section).scale for section in preset["guidance"]] == [1.0]
    saved = merge_estimate(EmbeddingConfig(), {"temperature": temperature})
    estimate = merge_estimate(saved, preset["estimate"]).estimate
    assert estimate.mode == "sample"
    assert estimate.temperature.model_dump() == preset["estimate"]["temperature"]


def test_the_paper_preset_has_eight_end_points():
    preset = l2d_presets()["l2d-paper"]
    assert build(preset["solver"]).grid_size(preset["num_inference_steps"]) == 8


def test_a_preset_may_be_changed_without_changing_the_next_one():
    l2d_presets()["l2d-paper"]["estimate"]["temperature"]["power"] = 3.0
    assert l2d_presets()["l2d-paper"]["estimate"]["temperature"]["power"] == 1.0


LONG = {
    "l2d": {
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding"},
        "backbone": {"name": "two_stream"},
        "block_size": 1,
        "sampling": {"preset": "l2d-paper"},
        "data": {"train": [{"path": "texts"}], "padding": "none"},
    },
    "tess": {
        "schedule": {"name": "cosine"},
        "parametrization": {"name": "simplex"},
        "backbone": {"name": "in_place"},
        "block_size": None,
        "sampling": {"preset": "tess2"},
        "data": {"train": [{"path": "texts"}], "padding": "target"},
    },
}

LONG["l2d-steps"] = {
    **LONG["l2d"],
    "backbone": {"name": "two_stream", "carry": True, "gates": "open"},
    "training": {"unroll": {"fewest": 2, "most": 8}},
}


@pytest.mark.parametrize("method", LONG)
def test_a_method_is_what_it_is_written_out(method):
    model, data = {"model": {"base": "org/model"}}, {"data": {"train": [{"path": "texts"}]}}
    named = ("schedule", "parametrization", "backbone", "training")
    components = {part: LONG[method][part] for part in named if part in LONG[method]}
    hashes = {
        config_hash(parse_run(model | fields))
        for fields in (LONG[method], {"method": method} | data, components | data)
    }
    assert len(hashes) == 1


def test_another_state_space_brings_its_own_settings():
    run = parse_run({"model": {"base": "org/model"}, "method": "l2d", "parametrization": {"name": "simplex"}})
    assert run.sampling.preset == "tess2"
    assert run.block_size is None
    assert run.schedule.component_name() == "linear"
