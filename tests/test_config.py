import json
import math
from typing import Any

import pytest
from fake_plugins import TOYS, installed, plugin
from safetensors.torch import save_file
from toy_components import Doubling, Forward, Sharpen

from l2d_framework.config import (
    DiffusionRun,
    LanguageModelRun,
    TrainingSection,
    check_runs,
    config_hash,
    default_sampling,
    json_schema,
    load_run,
    parse_run,
    parse_stages,
    resolved_json,
)
from l2d_framework.config.files import override, parse_yaml
from l2d_framework.errors import ConfigError
from l2d_framework.registry import Registry

SCRATCH = {
    "kind": "language_model",
    "scratch": {"tokenizer": {"vocab_size": 300}, "config": {"model_type": "llama", "hidden_size": 32}},
}


@pytest.fixture(autouse=True)
def _toys():
    with installed(TOYS):
        yield


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"base": "org/model"},
        "schedule": {"name": "circle"},
        "parametrization": {"name": "projected"},
        "backbone": {"name": "beside"},
        **changes,
    }


def diffusion(**changes: Any) -> DiffusionRun:
    run = parse_run(fields(**changes))
    assert isinstance(run, DiffusionRun)
    return run


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("true", True),
        ("", None),
        ("~", None),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("017", 17),
        ("1_000", "1_000"),
        ("1.2.3", "1.2.3"),
        ("'1'", "1"),
        ("[1e-5, {1: a}]", [1e-5, {"1": "a"}]),
        ("{a: &x {b: 1, c: 2}, d: {<<: *x, b: 3}}", {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}),
    ],
)
def test_a_scalar_means_what_it_looks_like(text, value):
    found = parse_yaml(text, "run")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "run.yaml, line 5: duplicate key 'c'"),
        ("a: 1\n1: x\n'1': y\n", "run.yaml, line 3: duplicate key '1'"),
        ("a: 1\n[1, 2]: 3\n", "line 2: a key must be a single word"),
        ("a: 1\nb: [1\n", "run.yaml, line 3"),
        ("a: !!python/name:os.system\n", "run.yaml, line 1: the tag '!!python/name:os.system' is not understood"),
        ("- a\n", "holds `key: value` lines"),
    ],
)
def test_malformed_yaml_names_the_line(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml")
    assert message in str(caught.value)


def test_a_small_number_in_a_run_file_is_a_number(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(fields()) + "\n")
    (run,) = load_run(tmp_path / "run.yaml", ["training.learning_rate=1e-5"])
    assert run.training.learning_rate == 1e-5


# Overrides


def test_an_override_reaches_sections_lists_and_what_is_not_there_yet():
    data = {"a": [{"b": 1}, {"b": 2}], "c": None}
    changed = override(data, ["a.1.b=[1e-3, x]", "c.d.e=true", "f=", "g=a=b"])
    assert changed == {"a": [{"b": 1}, {"b": [1e-3, "x"]}], "c": {"d": {"e": True}}, "f": None, "g": "a=b"}
    assert data == {"a": [{"b": 1}, {"b": 2}], "c": None}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "is no key=value"),
        ("=1", "is no key=value"),
        ("a..b=1", "is no key=value"),
        ("list.2=1", "has 2 entries, got '2'"),
        ("list.x.y=1", "has 2 entries, got 'x'"),
        ("seed.x=1", "lies below the value 0"),
        ("seed=[1", "line"),
    ],
)
def test_a_malformed_override_is_refused(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override({"seed": 0, "list": [1, 2]}, [assignment])


# Round trips


@pytest.mark.parametrize(
    "data",
    [
        fields(),
        fields(sampling={"preset": "toy-adaptive"}, seed=3, training={"betas": [0.5, 0.6]}),
        fields(parametrization={"name": "projected", "size": 3, "estimate": {"temperature": 2.0}}, classes=["x", "y"]),
        fields(sampling={"guidance": [{"name": "sharpen", "scale": 2}]}, data={"train": [{"path": "a", "weight": 2}]}),
        SCRATCH,
        {"kind": "language_model", "model": {"base": "org/model"}, "lora": {"targets": "all-linear"}},
    ],
)
def test_a_resolved_run_reloads_as_itself(tmp_path, data):
    run = parse_run(data)
    for suffix in ("json", "yaml"):
        path = tmp_path / f"run.{suffix}"
        path.write_text(resolved_json(run))
        (again,) = load_run(path)
        assert again == run
        assert config_hash(again) == config_hash(run)


def test_a_resolved_run_outlives_its_preset(tmp_path):
    run = diffusion()
    (tmp_path / "run.json").write_text(resolved_json(run))
    without = plugin("toys", TOYS.load().l2d_components())
    with installed(without):
        (again,) = load_run(tmp_path / "run.json")
    assert again.sampling.model_dump() == run.sampling.model_dump()


def test_a_method_stands_for_its_components_and_settings():
    short = {"model": {"base": "org/model"}, "method": "toy"}
    assert config_hash(parse_run(short)) == config_hash(diffusion())
    # An option changes a component, another name replaces it.
    assert parse_run({**short, "sampling": {"num_inference_steps": 3}}) == diffusion(
        sampling={"num_inference_steps": 3}
    )
    estimate = {"estimate": {"temperature": 0.25}}
    changed = diffusion(parametrization={"name": "projected", **estimate})
    assert parse_run({**short, "parametrization": estimate}) == changed
    assert parse_run({**short, "backbone": {"name": "canvas"}}) == diffusion(backbone={"name": "canvas"})


def test_whatever_a_method_says_lies_under_the_run():
    fields = {
        **TOYS.load().l2d_methods()["toy"],
        "sampling": {"preset": "toy-default", "patience": 3, "seed": 4},
        "training": {"learning_rate": 0.123},
        "block_size": 2,
        "seed": 9,
    }
    more = plugin("more", methods={"other": fields})
    with installed(TOYS, more):
        run = parse_run({"model": {"base": "org/model"}, "method": "other", "sampling": {"seed": 5}})
        assert (run.sampling.patience, run.sampling.seed, run.block_size, run.seed) == (3, 5, 2, 9)
        assert run.sampling.solver.component_name() == "forward"
        assert run.training.learning_rate == 0.123


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "toi"}, "method: Unknown method 'toi'; did you mean 'toy'"),
        ({"method": 3}, "method: Unknown method '3'"),
        ({"method": "toy", "backbone": 3}, "backbone: "),
        ({"method": "toy", "schedule": {"name": "none"}}, "schedule.*none"),
        ({"method": "toy", "kind": "language_model"}, "method: "),
    ],
)
def test_a_wrong_method_is_refused_by_its_place(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_run({"model": {"base": "org/model"}, **changes})


def test_the_hash_depends_on_values_and_not_on_order():
    assert config_hash(diffusion()) == config_hash(parse_run(dict(reversed(fields().items()))))
    assert config_hash(diffusion()) != config_hash(diffusion(seed=1))


def test_nothing_is_dropped_from_a_component_when_it_is_stored():
    stored = json.loads(resolved_json(diffusion(sampling={"solver": {"name": "doubling", "max_evaluations": 33}})))
    assert stored["sampling"]["solver"] == {"name": "doubling", "max_evaluations": 33}
    assert stored["parametrization"]["estimate"] == {"temperature": 1.0}


# Presets


def test_explicit_values_win_over_the_preset_and_the_preset_over_defaults():
    assert diffusion().sampling.preset == "toy-default"
    assert diffusion().sampling.num_inference_steps == 7
    assert diffusion(sampling={"num_inference_steps": 4}).sampling.num_inference_steps == 4
    assert diffusion(sampling={"preset": "toy-guided"}).sampling.guidance == [Sharpen()]
    assert diffusion(sampling={"preset": "toy-guided", "guidance": []}).sampling.guidance == []


def test_another_solver_takes_no_option_of_the_presets():
    changed = diffusion(sampling={"preset": "toy-adaptive", "solver": {"name": "forward"}, "num_inference_steps": 2})
    assert changed.sampling.solver == Forward()
    assert diffusion(sampling={"preset": "toy-adaptive", "solver": {}}).sampling.solver == Doubling(max_evaluations=99)


def test_an_estimate_written_anywhere_wins_over_the_preset():
    written = {"name": "projected", "estimate": {"temperature": 3.0}}
    assert diffusion().sampling.estimate == {"temperature": 0.5}
    assert diffusion(parametrization=written).sampling.estimate == {"temperature": 3.0}
    both = diffusion(parametrization=written, sampling={"estimate": {"temperature": 4.0}})
    assert both.sampling.estimate == {"temperature": 4.0}


# Sampling of a request


def resolve(**options: Any) -> Any:
    run = diffusion(sampling={"guidance": [{"name": "sharpen", "scale": 3.0}], "seed": 5, "num_inference_steps": 9})
    return run.sampling.resolve(run.parametrization, options)


def test_no_option_changes_nothing():
    run = diffusion()
    assert run.sampling.resolve(run.parametrization, {}) == run.sampling
    assert default_sampling(run.parametrization) == run.sampling


def test_a_component_may_be_given_by_name_by_section_or_as_itself():
    for solver in ("doubling", {"name": "doubling"}, Doubling()):
        assert resolve(solver=solver).solver == Doubling()
    for guidance in ("sharpen", {"name": "sharpen"}, Sharpen()):
        assert resolve(guidance=[guidance]).guidance == [Sharpen()]


def test_options_change_only_what_they_name():
    changed, before = resolve(num_inference_steps=2), resolve()
    assert changed.model_copy(update={"num_inference_steps": 9}) == before


def test_a_preset_replaces_the_section_but_seed_and_guidance():
    changed = resolve(preset="toy-adaptive")
    assert (changed.solver, changed.num_inference_steps) == (Doubling(max_evaluations=99), None)
    assert (changed.seed, changed.guidance) == (5, [Sharpen(scale=3.0)])
    assert changed.estimate == {"temperature": 1.0}
    assert resolve(preset="toy-guided").guidance == [Sharpen()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 3}, "sampling.num_steps: unknown field, got 3; did you mean 'num_inference_steps'"),
        ({"solver": "forwad"}, "sampling.solver: Unknown solver 'forwad'; did you mean 'forward'"),
        ({"solver": 3}, "sampling.solver: should be a section with a name, got 3"),
        ({"guidance": "sharpen"}, "sampling.guidance: should be a list, got .sharpen."),
        ({"estimate": {"temp": 1}}, "estimate.temp"),
        ({"preset": "toy-guide"}, "Unknown preset 'toy-guide'; did you mean 'toy-guided'"),
        ({"num_inference_steps": None}, "num_inference_steps: solver 'forward' needs a number"),
        ({"end_time": 1.5}, "sampling.end_time: should be less than or equal to 1, got 1.5"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(**options)


# Classes


def test_classes_tell_the_backbone_how_many_there_are():
    assert diffusion(classes=["x", "y"]).backbone.num_classes == 2
    assert diffusion(classes=["x", "y"], backbone={"name": "beside", "num_classes": 2}).backbone.num_classes == 2


# Runs and pipelines


def test_a_run_is_a_diffusion_run_unless_it_says_otherwise():
    assert isinstance(parse_run(fields()), DiffusionRun)
    assert isinstance(parse_run(SCRATCH), LanguageModelRun)


def test_a_later_stage_may_start_from_an_earlier_one(tmp_path):
    first = SCRATCH | {"output_dir": str(tmp_path / "base")}
    lora = {
        "kind": "language_model",
        "model": {"base": str(tmp_path / "base")},
        "lora": {},
        "output_dir": str(tmp_path / "lora"),
    }
    runs = parse_stages({"stages": [first, lora, fields(model={"base": f"{tmp_path}/lora"})]})
    check_runs(runs)
    with pytest.raises(ConfigError, match=r"model.base: no such folder, got .*lora"):
        check_runs(runs[2:])
    refusing = parse_stages({"stages": [first, fields(model={"base": f"{tmp_path}/base"}, block_size=4)]})
    with pytest.raises(ConfigError, match="block_size must be 1"):
        check_runs(refusing)


def test_a_stage_cannot_start_from_a_diffusion_model_without_a_language_model_of_its_own(saved_tiny_lm, tmp_path):
    first = fields(model={"base": str(saved_tiny_lm())}, output_dir=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="will hold a diffusion model"):
        check_runs(parse_stages({"stages": [first, fields(model={"base": str(tmp_path / "out")})]}))


def test_every_problem_of_every_stage_is_reported_at_once():
    stages = [
        fields(seed=-1, block_size=0),
        fields(sampling={"num_inference_steps": None}),
        {"kind": "language_mode"},
        SCRATCH,
    ]
    with pytest.raises(ConfigError) as caught:
        parse_stages({"stages": stages})
    places = [line.partition(":")[0] for line in str(caught.value).splitlines()]
    assert places == ["stages.0.block_size", "stages.0.seed", "stages.1.sampling.num_inference_steps", "stages.2.kind"]


def test_what_is_wrong_without_asking_plugins_is_reported_first_of_every_stage(monkeypatch):
    names = Registry.load([TOYS])  # as if the toys declared what they offer
    monkeypatch.setattr("l2d_framework.config.parsing.declared", lambda: names)
    wrong = [fields(seed=-1, schedule={"name": "circl"}), {"kind": "language_mode"}]
    late = [fields(sampling={"num_inference_steps": None}), SCRATCH, fields(schedule={"name": "circle", "radius": 1})]
    for stages, expected in (
        (wrong + late, ["stages.0.schedule", "stages.0.seed", "stages.1.kind"]),
        (late, ["stages.0.sampling.num_inference_steps", "stages.2.schedule.radius"]),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_stages({"stages": stages})
        assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == expected


def test_an_adapter_folder_stands_for_its_base(saved_tiny_lm, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(saved_tiny_lm())}))
    save_file({}, adapter / "adapter_model.safetensors", {"format": "pt"})
    check_runs([diffusion(model={"base": str(adapter)})])
    with pytest.raises(ConfigError, match="is itself an adapter"):
        check_runs([diffusion(model={"base": str(adapter), "adapter": str(adapter)})])
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone"}))
    with pytest.raises(ConfigError, match=r"no such folder, got '/gone'; .* PEFT adapter '.*adapter' .* write where"):
        check_runs([diffusion(model={"base": str(adapter)})])


# Values and schema


def test_sections_are_frozen_and_defaults_are_shared_safely():
    with pytest.raises(ValueError, match="frozen"):
        TrainingSection().epochs = 2
    assert diffusion().training == TrainingSection()


def test_the_schema_names_every_component_and_forbids_unknown_fields():
    schema = json_schema()
    definitions = schema["$defs"]
    for component in ("Circle", "Toy", "Forward", "Doubling", "Sharpen", "Beside", "Canvas"):
        assert definitions[component]["additionalProperties"] is False
    union = definitions["SamplingSection"]["properties"]["solver"]
    assert set(union["discriminator"]["mapping"]) == {"forward", "doubling"}
    assert {"DiffusionRun", "LanguageModelRun", "Pipeline"} <= set(definitions)


def test_the_schema_requires_only_what_a_run_file_must_say():
    definitions = json_schema()["$defs"]
    run = definitions["DiffusionRun"]
    assert run["required"] == ["model"]
    assert [set(choice["required"]) for choice in run["anyOf"]] == [{"method"}, set(fields()) - {"model"}]
    assert [choice["const"] for choice in run["properties"]["method"]["oneOf"]] == ["toy"]
    assert definitions["SamplingSection"]["required"] == []
