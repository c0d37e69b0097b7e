"""Checkpoints of the authors' L2D code become ours; their numbers are checked against the golden files elsewhere."""

import json
import pickle
import resource

import pytest
import torch
import typer
from diffusion_models import NETWORK, SPACE, all_known, ask_everywhere, diffusion_lm, random_tokens
from foreign_checkpoints import their_name, write_l2d
from tiny_models import tiny_lm
from typer.testing import CliRunner

from l2d_framework.cli.convert import convert as command
from l2d_framework.errors import CheckpointError, ConfigError, OutputError, PluginError
from l2d_framework.models import convert as convert_module
from l2d_framework.models.checkpoint import load
from l2d_framework.models.convert import convert

CASES = [
    ("llama", "lora", {"tie_word_embeddings": True}, ()),
    ("llama", "lora", {}, ("math", "code", "general")),
    ("qwen2", "lora", {"tie_word_embeddings": True}, ("math",)),
    ("llama", "full", {}, ()),
    ("qwen2", "full", {}, ("math", "code")),
]


def write(folder, family="llama", variant="lora", config=None, classes=("math", "code"), **flow):
    """The folder that the authors' code would write for a model, and that model."""
    model = diffusion_lm(tiny_lm(family, **(config or {})), variant=variant, classes=classes)
    settings = {"noise_rescaling": SPACE["prior_scale"], "flow_lora_alpha": NETWORK["alpha"], **flow}
    return write_l2d(folder, model, **settings), model


def edit(folder, change):
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


def logits(model):
    query = ask_everywhere(model, all_known(random_tokens(2, 7)))
    if model.origin.classes:
        query = query.replace(condition=torch.zeros(2, 7, dtype=torch.int64))
    with torch.no_grad():
        return model(query).logits


def test_the_names_of_the_authors_are_those_of_their_documentation():
    assert their_name("backbone.conditioning.layers.3.2.bias") == "model.layers.3.modulation_head.mlp.2.bias"
    name = "backbone.shadows.1.shadow.mlp.gate_proj.lora_B.diffusion.weight"
    assert their_name(name) == "model.layers.1.mlp.flow_gate_proj.B"
    assert their_name("backbone.shadows.0.shadow.self_attn.q_proj.bias") == "model.layers.0.self_attn.flow_q_proj.bias"
    assert their_name("backbone.conditioning.final.0.weight") == "model.modulation_head.mlp.0.weight"
    assert their_name("backbone.conditioning.classes.weight") == "model.data_label_embedder.weight"


@pytest.mark.parametrize(("family", "variant", "config", "classes"), CASES)
def test_a_converted_checkpoint_is_the_model_bit_for_bit(tmp_path, family, variant, config, classes):
    source, model = write(tmp_path / "theirs", family, variant, config, classes)
    converted = convert(str(source), tmp_path / "ours", reader="l2d-reference", classes=classes)
    loaded = load(tmp_path / "ours")
    wanted = logits(model)
    assert torch.equal(logits(converted), wanted)
    assert torch.equal(logits(loaded), wanted)
    assert loaded.origin.classes == classes
    for field in ("variant", "num_classes", "time_features", "conditioning_size"):
        assert getattr(loaded.backbone.config, field) == getattr(model.backbone.config, field)
    assert loaded.parametrization.config == model.parametrization.config
    own = model.own_parameters()
    assert all(torch.equal(weight, own[name]) for name, weight in loaded.own_parameters().items())


def test_settings_may_stand_at_the_top_of_the_config(tmp_path):
    source, model = write(tmp_path / "theirs")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | config.pop("flow_config")))
    assert torch.equal(logits(convert(str(source), tmp_path / "ours", reader="l2d-reference")), logits(model))


def test_a_training_snapshot_is_unwrapped(tmp_path):
    source, model = write(tmp_path / "theirs")
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({"model": state}, source / "pytorch_model.bin")
    assert torch.equal(logits(convert(str(source), tmp_path / "ours", reader="l2d-reference")), logits(model))


def test_over_the_original_model_no_second_copy_is_written(tmp_path):
    source, model = write(tmp_path / "theirs")
    model.backbone.lm.save_pretrained(tmp_path / "base")
    converted = convert(str(source), tmp_path / "ours", reader="l2d-reference", base=str(tmp_path / "base"))
    assert torch.equal(logits(converted), logits(model))
    assert not (tmp_path / "ours" / "base").exists()
    assert load(tmp_path / "ours").origin.model.base == str(tmp_path / "base")


def test_a_converted_checkpoint_is_loaded_from_any_folder(tmp_path, monkeypatch):
    write(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    convert("theirs", "ours", reader="l2d-reference")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(tmp_path / "ours").origin.classes == ("class_0", "class_1")


def test_a_base_the_path_was_not_trained_over_is_refused(tmp_path):
    source, _ = write(tmp_path / "theirs")
    tiny_lm(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="differs from the base model's, so the diffusion path was trained over"):
        convert(str(source), tmp_path / "ours", reader="l2d-reference", base=str(tmp_path / "other"))
    assert not (tmp_path / "ours" / "l2d.json").exists()


def test_a_folder_that_is_not_empty_is_not_written_to(tmp_path):
    source, _ = write(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").touch()
    with pytest.raises(ConfigError, match=r"is not empty. Give a new folder"):
        convert(str(source), tmp_path / "ours", reader="l2d-reference")


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path, monkeypatch):
    source, _ = write(tmp_path / "theirs")
    plain = convert_module.save

    def save(*arguments, **options):
        plain(*arguments, **options)
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / "mine").write_text("mine")

    monkeypatch.setattr(convert_module, "save", save)
    with pytest.raises(ConfigError, match="was filled by another process meanwhile"):
        convert(str(source), tmp_path / "ours", reader="l2d-reference")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine"]


def test_a_full_disk_is_named_and_nothing_is_left_of_what_was_written(tmp_path):
    source, _ = write(tmp_path / "theirs")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OutputError, match="ours' could not be written: File too large") as found:
            convert(str(source), tmp_path / "ours", reader="l2d-reference")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_names_that_are_not_as_many_as_the_classes_are_refused_before_anything_is_written(tmp_path):
    source, _ = write(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"has 2 classes; 1 names were given: \['math'\]"):
        convert(str(source), tmp_path / "ours", reader="l2d-reference", classes=("math",))
    assert not (tmp_path / "ours").exists()


class Code:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    source, _ = write(tmp_path / "theirs")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"model.embed_tokens.weight": Code()}, protocol=2))
    with pytest.raises(CheckpointError, match="is damaged or holds more than weights"):
        convert(str(source), tmp_path / "ours", reader="l2d-reference")
    torch.save({"model.embed_tokens.weight": Code()}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is damaged or holds more than weights"):
        convert(str(source), tmp_path / "ours", reader="l2d-reference")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json"])
def test_damaged_and_missing_files_are_named(tmp_path, name):
    source, _ = write(tmp_path / "theirs")
    content = (source / name).read_bytes()
    (source / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is damaged or holds more than weights"):
        convert(str(source), tmp_path / "ours", reader="l2d-reference")
    (source / name).unlink()
    with pytest.raises(CheckpointError, match=f"holds no {name}. Give the folder of an L2D checkpoint"):
        convert(str(source), tmp_path / "ours", reader="l2d-reference")


LAYOUTS = [
    (lambda s: s.update({"model.flow_extra.weight": torch.zeros(2)}), "it holds 'model.flow_extra.weight'"),
    (
        lambda s: [s.pop(key) for key in list(s) if "flow_" in key or "modulation" in key or "embedder" in key],
        "it holds no diffusion weights",
    ),
    (
        lambda s: s.pop("model.layers.1.modulation_head.mlp.2.bias"),
        r"missing \[\('backbone.conditioning.layers.1.2.bias', 192\)\]",
    ),
    (
        lambda s: s.update({"model.layers.7.modulation_head.mlp.0.bias": torch.zeros(8)}),
        r"unknown \[\('backbone.conditioning.layers.7.0.bias', 8\)\]",
    ),
    (lambda s: s.update({"model.modulation_head.mlp.2.bias": torch.zeros(7)}), "missing .*final.2.bias', 32"),
    (lambda s: s.pop("model.norm.weight"), r"incomplete: missing \['model.norm.weight'\]"),
    (lambda s: s.update({"model.other.weight": torch.zeros(2)}), r"unexpected \['model.other.weight'\]"),
]


@pytest.mark.parametrize(("change", "message"), LAYOUTS)
def test_strange_and_missing_weights_are_named(tmp_path, change, message):
    source, _ = write(tmp_path / "theirs")
    edit(source, change)
    with pytest.raises(CheckpointError, match=message):
        convert(str(source), tmp_path / "ours", reader="l2d-reference")
    assert not (tmp_path / "ours" / "l2d.json").exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {"model": torch.zeros(2)}])
def test_a_file_without_named_weights_is_refused(tmp_path, content):
    source, _ = write(tmp_path / "theirs")
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="is not laid out like a released L2D checkpoint: it holds no named weights"
    ):
        convert(str(source), tmp_path / "ours", reader="l2d-reference")


@pytest.mark.parametrize("switch", ["freeze_modulation_at_flow_start", "modulate_hidden_states"])
def test_switches_that_compute_something_else_are_refused(tmp_path, switch):
    source, _ = write(tmp_path / "theirs", **{switch: True})
    with pytest.raises(CheckpointError, match=f"sets {switch}=True; only False, which the published models use"):
        convert(str(source), tmp_path / "ours", reader="l2d-reference")


def test_an_unknown_format_is_answered_with_a_suggestion(tmp_path):
    source, _ = write(tmp_path / "theirs")
    with pytest.raises(PluginError, match="'l2d-referense'; did you mean 'l2d-reference'"):
        convert(str(source), tmp_path / "ours", reader="l2d-referense")


def test_the_command_converts_and_says_how_to_go_on(tmp_path):
    source, model = write(tmp_path / "theirs")
    app = typer.Typer()
    app.command()(command)
    arguments = [str(source), str(tmp_path / "ours"), "--from", "l2d-reference", "--classes", "math, code"]
    found = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert found.exit_code == 0
    assert f"{sum(w.numel() for w in model.own_parameters().values()):,} diffusion parameters" in found.output
    assert f"l2d generate {tmp_path / 'ours'}" in found.output
    assert load(tmp_path / "ours").origin.classes == ("math", "code")
