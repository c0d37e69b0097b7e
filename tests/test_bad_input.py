"""What a user can get wrong, each refused before any weights are loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_plugins import broken, installed
from transformers import AutoModelForCausalLM, PreTrainedModel

from l2d_framework.config import check_runs, load_run
from l2d_framework.errors import CheckpointError, ConfigError, L2DError, UnsupportedModelError
from l2d_framework.registry import INTERFACES


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


@pytest.fixture
def run_file(tmp_path, saved_tiny_lm):
    """Writes a good diffusion run with some fields replaced; a value of None leaves the field out."""
    base = str(saved_tiny_lm())
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')

    def write(**changes: Any) -> Path:
        run = {
            "model": {"base": base},
            "schedule": {"name": "linear"},
            "parametrization": {"name": "embedding"},
            "backbone": {"name": "two_stream"},
            "data": {"train": [{"path": str(tmp_path / "data.jsonl")}]},
            "output_dir": str(tmp_path / "out" / "deep"),
            **changes,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in run.items() if value is not None}))
        return path

    return write


def check(path: Path, *overrides: str) -> None:
    check_runs(load_run(path, list(overrides)))


def test_the_good_run_passes_and_leaves_no_folder(run_file, tmp_path):
    check(run_file())
    assert not (tmp_path / "out").exists()


def test_a_missing_run_file(tmp_path):
    with pytest.raises(ConfigError, match=r"'.*none.yaml' does not exist"):
        check(tmp_path / "none.yaml")


def test_a_folder_or_binary_for_a_run_file(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "run.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            check(path)


UNKNOWN_NAMES = {
    "schedule": ("schedule.name=linaer", "'linaer'; did you mean 'linear'"),
    "parametrization": ("parametrization.name=embeding", "did you mean 'embedding'"),
    "backbone": ("backbone.name=twostream", "did you mean 'two_stream'"),
    "solver": ("sampling.solver.name=midpont", "did you mean 'midpoint'"),
    "guidance": ("sampling.guidance=[{name: classifier}]", "did you mean 'classifier_free'"),
    "preset": ("sampling.preset=l2d-papr", "did you mean 'l2d-paper'"),
    "kind": ("kind=difusion", "did you mean 'diffusion'"),
    "tracker": ("training.report_to=[tensorbord]", "did you mean 'tensorboard'"),
}


@pytest.mark.parametrize("name", UNKNOWN_NAMES)
def test_an_unknown_name_is_answered_with_a_suggestion(run_file, name):
    override, message = UNKNOWN_NAMES[name]
    with pytest.raises(ConfigError, match=message):
        check(run_file(), override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainig={}", "trainig: unknown field, got {}; did you mean 'training'"),
        ("training.learning_rat=1", "training.learning_rat: unknown field, got 1; did you mean 'learning_rate'"),
        ("data.train.0.pth=x", "data.train.0.pth: unknown field, got 'x'; did you mean 'path'"),
        ("schedule.beta=1", "schedule.beta: unknown field, got 1; known: .*name"),
        ("sampling.solver={name: bosh3, rtl: 1}", "sampling.solver.rtl: unknown field, got 1; did you mean 'rtol'"),
        ("parametrization.estimate.mod=x", "parametrization.estimate.mod: unknown field"),
        ("training.epochs=-1", "training.epochs: should be greater than 0, got -1"),
        ("training.batch_size=1.5", "training.batch_size: should be a valid integer.*, got 1.5"),
        ("training.batch_size='8'", "training.batch_size: should be a valid integer, got '8'"),
        ("training.bf16=yes", "training.bf16: should be a valid boolean, got 'yes'"),
        ("training.learning_rate=.inf", "training.learning_rate: should be a finite number"),
        ("training.warmup=logarithmic", "training.warmup: should be 'linear' or 'log', got 'logarithmic'"),
        ("training.micro_batch_size=big", "training.micro_batch_size: .*'auto'.*, got 'big'"),
        ("training.micro_batch_size=0", "training.micro_batch_size: .*greater than or equal to 1, got 0"),
        ("training.micro_batch_size=5", "batch_size 32 is no multiple of micro_batch_size 5"),
        ("training.final_learning_rate=1", "final_learning_rate 1.0 exceeds learning_rate"),
        ("training.betas=[0.9, 1]", r"betas must lie in \[0, 1\)"),
        ("training.eval_steps=5", "eval_steps is 5 but nothing is held out"),
        ("data.streaming=true", "set training.max_steps"),
        ("data.train=[]", "data.train: .*at least 1 item"),
        ("data={}", "data.train: is required; add it"),
        ("model.dtype=fp16", "model.dtype: should be 'auto', .* got 'fp16'"),
        ("model.attn_implementation=flash", "model.attn_implementation: should be 'sdpa' or 'eager'"),
        ("block_size=0", "block_size: should be greater than or equal to 1, got 0"),
        ("sampling.num_inference_steps=14", "14. Use 13 or 15"),
        ("sampling.num_inference_steps=-1", "sampling.num_inference_steps: should be greater than or equal to 0"),
        ("sampling.end_time=2", "sampling.end_time: should be less than or equal to 1, got 2"),
        ("sampling.estimate={temp: 1}", "sampling.estimate: .*estimate.temp"),
        ("sampling.guidance=[{name: classifier_free, scale: 2}]", "needs a model with classes"),
        ("classes=[a, a]", "names one class twice"),
        ("data.train.0.class_column=topic", "class_column 'topic' is given but classes is empty"),
        ("data.class_map={x: y}", r"data.class_map leads to \['y'\]"),
        ("backbone=two_stream", "backbone: should be a section with a name, got 'two_stream'; write {name: ...}"),
        ("backbone={}", "backbone: should be a section with a name, got {}"),
        ("model=x", "model: should be a section, got 'x'|model: .*valid"),
        ("model.base=[1]", r"model.base: should be a valid string, got \[1\]"),
        ("sampling=3", "sampling: .*got 3"),
        ("stages=[]", "stages: must stand alone"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(run_file, override, message):
    with pytest.raises(ConfigError, match=message):
        check(run_file(), override)


def test_classes_that_disagree_with_the_backbone(run_file):
    with pytest.raises(ConfigError, match="classes has 2 names but backbone 'two_stream' has 3 classes"):
        check(run_file(), "classes=[a, b]", "backbone.num_classes=3")


@pytest.mark.parametrize("field", ["model", "schedule", "parametrization", "backbone"])
def test_a_missing_section(run_file, field):
    with pytest.raises(ConfigError, match=f"{field}: is required; add it"):
        check(run_file(**{field: None}))


def test_an_empty_run_file(tmp_path):
    (tmp_path / "run.yaml").touch()
    with pytest.raises(ConfigError, match="holds `key: value` lines"):
        check(tmp_path / "run.yaml")


@pytest.mark.parametrize("stages", [[], [1], "x"])
def test_stages_that_are_no_runs(tmp_path, stages):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"stages": stages}))
    with pytest.raises(ConfigError, match="stages: should be a list of runs"):
        check(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.0.path=./none.jsonl", "data.train.0.path: no such file or folder, got './none.jsonl'"),
        ("data.train.0.path=none.parquet", "data.train.0.path: no such file or folder"),
        ("data.train.0.path=a b", "data.train.0.path: neither a file, a folder nor a hub id"),
        ("data.eval=[{path: /none}]", "data.eval.0.path: no such file or folder, got '/none'"),
        ("data.train=[{path: json, data_files: ./none-*.jsonl}]", "data.train.0.data_files: no such file"),
        ("model.base=./none", "model.base: no such folder, got './none'"),
        ("model.base=a/b/c", "model.base: no such folder, got 'a/b/c'"),
        ("model.base=org/none", "model.base: no model can be read from 'org/none'"),
        ("model.adapter=./none", "model.adapter: no PEFT adapter there, got './none'"),
        ("output_dir=/proc/none", "output_dir: '/proc/none' cannot be written"),
    ],
)
def test_a_missing_file_or_folder(run_file, override, message):
    with pytest.raises(ConfigError, match=message):
        check(run_file(), override)


def test_an_output_folder_below_a_file(run_file, tmp_path):
    with pytest.raises(ConfigError, match=r"output_dir: .*cannot be written .*Not a directory"):
        check(run_file(output_dir=str(tmp_path / "data.jsonl" / "out")))


def test_data_files_are_looked_for_in_a_local_data_folder(run_file, tmp_path):
    check(run_file(data={"train": [{"path": str(tmp_path), "data_files": {"train": ["*.jsonl"]}}]}))
    with pytest.raises(ConfigError, match="data_files: no such file, got"):
        check(run_file(data={"train": [{"path": str(tmp_path), "data_files": {"train": ["none.jsonl"]}}]}))


def test_a_model_folder_without_config_or_weights(run_file, tmp_path, saved_tiny_lm):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check(run_file(model={"base": str(tmp_path / "empty")}))
    folder = saved_tiny_lm()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors"):
        check(run_file(model={"base": str(folder)}))


def test_a_model_whose_config_is_damaged_or_unknown(run_file, saved_tiny_lm):
    folder = saved_tiny_lm()
    for text in ('{"model_type": "lla', json.dumps({"model_type": "no-such-family"}), "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"model.base: no model can be read"):
            check(run_file(model={"base": str(folder)}))


def test_an_adapter_folder_that_is_damaged(run_file, tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text("{}")
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors"):
        check(run_file(), f"model.adapter={tmp_path}")
    (tmp_path / "adapter_model.safetensors").touch()
    for text in ("{}", "{", "[]"):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=r"names no base model|adapter_config.json' is damaged"):
            check(run_file(), f"model.base={tmp_path}")


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {"model_type": "vit"}, {"model_type": "t5"}])
def test_an_unsupported_model_family(run_file, saved_tiny_lm, config):
    folder = saved_tiny_lm()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=config["model_type"].upper() + "|'vit'|'t5'"):
        check(run_file(model={"base": str(folder)}))


def test_a_tracker_that_is_not_installed(run_file, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.get_available_reporting_integrations", list)
    with pytest.raises(ConfigError, match=r"'wandb' is not installed\. Run: pip install wandb"):
        check(run_file(), "training.report_to=[wandb]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"hidden_size": 32}}, "scratch: config needs a `model_type`"),
        ({"config": {"model_type": "lama"}}, "unknown to transformers, got 'lama'; did you mean 'llama'"),
        (
            {"config": {"model_type": "llama", "hiden_size": 3}},
            "unknown field of 'llama', got 3; did you mean 'hidden_size'",
        ),
        ({"config": {"model_type": "llama", "hidden_size": "x"}}, "scratch.config: transformers refuses it"),
        ({"tokenizer": {"vocab_size": 10}}, "scratch.tokenizer.vocab_size: should be greater than or equal to 257"),
    ],
)
def test_a_model_from_scratch_that_cannot_be(tmp_path, changes, message):
    scratch = {"tokenizer": {"vocab_size": 300}, "config": {"model_type": "llama"}} | changes
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"kind": "language_model", "scratch": scratch}))
    with pytest.raises(ConfigError, match=message):
        check(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({}, "give either model or scratch, got neither"),
        (
            {"model": {"base": "a"}, "scratch": {"tokenizer": {"vocab_size": 300}, "config": {"model_type": "llama"}}},
            "got both",
        ),
        (
            {"lora": {}, "scratch": {"tokenizer": {"vocab_size": 300}, "config": {"model_type": "llama"}}},
            "lora needs a model",
        ),
        ({"model": {"base": "a"}, "lora": {"targets": "all"}}, "lora.targets: .*all-linear"),
    ],
)
def test_a_language_model_run_that_contradicts_itself(tmp_path, run, message):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"kind": "language_model", **run}))
    with pytest.raises(ConfigError, match=message):
        check(tmp_path / "run.yaml")


def test_a_broken_plugin_is_named_when_something_is_missing(run_file):
    path = run_file()
    with installed(broken("acme", ImportError("no luck today"))), pytest.raises(ConfigError) as caught:
        check(path)
    assert (
        str(caught.value).count("no luck today") == len(INTERFACES) - 3
    )  # solver, guidance and drafter are not asked for


def test_every_error_is_one_of_ours(run_file):
    for override in ("seed=x", "model.base=./none", "sampling.preset=x", "no-equals"):
        with pytest.raises(L2DError):
            check(run_file(), override)
