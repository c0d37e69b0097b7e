"""The language model below: found, told apart from its copies, loaded with what was finetuned into it."""

import json
import shutil

import pytest
import torch
from diffusion_models import NETWORK, SPACE, all_known, ask_everywhere, random_tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from l2d_framework.base_model import (
    empty_language_model,
    fetch,
    fingerprint,
    load_config,
    load_language_model,
    load_tokenizer,
    locate,
)
from l2d_framework.config import ModelSection, parse_run
from l2d_framework.errors import CheckpointError, ConfigError
from l2d_framework.models.checkpoint import build_model, load, save
from l2d_framework.models.unloaded import UnloadedModel


@pytest.fixture
def base(saved_tiny_lm):
    return saved_tiny_lm()


@pytest.fixture
def finetuned(base, tmp_path):
    """A LoRA over the base: (its folder, folder of the merged weights)."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False, lora_alpha=8)
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "lora")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path / "lora", tmp_path / "merged"


def point(lora, base):
    """Have an adapter say that it was trained over a folder."""
    config = json.loads((lora / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (lora / "adapter_config.json").write_text(json.dumps(config))


def section(folder, **fields):
    return ModelSection(base=str(folder), **fields)


def diffusion(folder, **fields):
    run = {
        "model": {"base": str(folder), **fields},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding", **SPACE},
        "backbone": {"name": "two_stream", **NETWORK},
    }
    return build_model(parse_run(run))


def logits_at(model, t):
    model.backbone.conditioning.final[2].weight.data.fill_(0.5)
    with torch.no_grad():
        return model(ask_everywhere(model, all_known(random_tokens(2, 7)), t=t)).logits


def test_a_folder_is_found_where_it_is(base):
    assert fetch(str(base)) == base
    assert locate(section(base)) == (base, None)
    assert load_config(section(base)).model_type == "llama"


@pytest.mark.parametrize("path", ["/none/of/this", "./none", "~/none", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr("l2d_framework.base_model.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match=f"There is no folder '{path}'. Give the path of a model folder"):
        fetch(path)


def test_a_hub_id_that_cannot_be_reached_is_named():
    with pytest.raises(ConfigError, match="'org/none' is neither a folder here nor a hub repository"):
        fetch("org/none")


def test_weights_in_the_old_format_are_fetched_only_where_there_are_no_others(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "l2d_framework.base_model.snapshot_download",
        lambda path, revision, allow_patterns: asked.append((revision, allow_patterns[-1])) or str(tmp_path),
    )
    fetch("org/model", "abc")
    assert [revision for revision, _ in asked] == ["abc", "abc"]
    assert asked[1][1] == "*.bin"
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    fetch("org/model")
    assert len(asked) == 1


def test_configs_and_tokenizers_of_the_hub_are_read_without_fetching_weights(base, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "l2d_framework.base_model.snapshot_download",
        lambda path, revision, allow_patterns: asked.extend(allow_patterns) or str(base),
    )
    assert load_config(section("org/model")).model_type == "llama"
    load_tokenizer(section("org/model"))
    assert not [pattern for pattern in asked if "safetensors" in pattern or "bin" in pattern]
    assert locate(section("org/model")) == (base, None)
    assert "*.safetensors" in asked


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config.json, so it is no transformers model. Check model.base"):
        locate(section(tmp_path))


def test_the_fingerprint_is_that_of_the_weights_and_not_of_their_place(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    assert fingerprint(section(copy)) == fingerprint(section(base))


def test_the_fingerprint_tells_a_changed_weight_name_or_type(base):
    weights = load_file(base / "model.safetensors")
    seen = {fingerprint(section(base))}
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        save_file({**weights, name: weights[name] + 1e-3}, base / "model.safetensors", {"format": "pt"})
        seen.add(fingerprint(section(base)))
    save_file({n: w.bfloat16() for n, w in weights.items()}, base / "model.safetensors", {"format": "pt"})
    seen.add(fingerprint(section(base)))
    save_file({n + ".x": w for n, w in weights.items()}, base / "model.safetensors", {"format": "pt"})
    seen.add(fingerprint(section(base)))
    assert len(seen) == 6


def test_the_fingerprint_covers_scalars_and_empty_tensors(base):
    odd = {"scale": torch.tensor(3.0), "none": torch.zeros(0, 4), "flags": torch.tensor([True, False])}
    save_file(odd, base / "model.safetensors", {"format": "pt"})
    first = fingerprint(section(base))
    save_file({**odd, "scale": torch.tensor(4.0)}, base / "model.safetensors", {"format": "pt"})
    assert fingerprint(section(base)) != first


def test_the_fingerprint_of_a_lora_covers_base_and_adapter(base, finetuned):
    lora, _ = finetuned
    both = fingerprint(section(lora))
    assert both == fingerprint(section(base, adapter=str(lora)))
    assert both != fingerprint(section(base))
    weights = load_file(lora / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] * 2}, lora / "adapter_model.safetensors", {"format": "pt"})
    assert fingerprint(section(lora)) != both


def test_weights_in_the_old_format_have_a_fingerprint_too(base):
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    torch.save({"lr": 0.1}, base / "training_args.bin")
    first = fingerprint(section(base))
    weights["lm_head.weight"][0] += 1
    torch.save(weights, base / "pytorch_model.bin")
    assert fingerprint(section(base)) != first


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_weights_are_named(base, name):
    if name.endswith(".bin"):
        torch.save(load_file(base / "model.safetensors"), base / name)
        (base / "model.safetensors").unlink()
    content = (base / name).read_bytes()
    (base / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"{name}'"):
        fingerprint(section(base))


def test_a_folder_without_weights_has_no_fingerprint(base):
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors or \*.bin weights"):
        fingerprint(section(base))


def test_what_transformers_cannot_load_is_named(saved_tiny_lm):
    base = saved_tiny_lm("gemma2")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "no-such-family"}))
    with pytest.raises(CheckpointError, match=r"config\.json of '.*' cannot be read"):
        load_language_model(section(base))
    for text in (json.dumps({**config, "model_type": "no-such-family"}), "{", "[]"):
        (base / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_config(section(base))


def test_weights_that_a_folder_lacks_are_never_made_up(base):
    file = base / "model.safetensors"
    state = load_file(file)
    del state["lm_head.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the weights \['lm_head.weight'\]"):
        load_language_model(section(base))


def test_shapes_alone_take_no_storage(base):
    empty = empty_language_model(load_config(section(base)), "sdpa")
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    real = load_language_model(section(base))
    assert {n: w.shape for n, w in empty.named_parameters()} == {n: w.shape for n, w in real.named_parameters()}


def test_an_adapter_over_an_adapter_is_refused(finetuned):
    lora, _ = finetuned
    with pytest.raises(ConfigError, match=r"is itself a PEFT adapter, so model.adapter .* would be a second one"):
        locate(section(lora, adapter=str(lora)))


def test_an_adapter_is_merged_into_the_base(base, finetuned):
    lora, merged = finetuned
    wanted = load_language_model(section(merged)).state_dict()
    for reference in (section(lora), section(base, adapter=str(lora))):
        model = load_language_model(reference)
        assert not isinstance(model, PeftModel)
        assert not model.training
        found = model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(
        load_language_model(section(base)).state_dict()["model.layers.0.mlp.up_proj.weight"],
        wanted["model.layers.0.mlp.up_proj.weight"],
    )


@pytest.mark.parametrize("t", [0.0, 0.5])
def test_diffusion_over_a_lora_is_diffusion_over_its_merged_weights(base, finetuned, t):
    lora, merged = finetuned
    wanted = logits_at(diffusion(merged), t)
    assert torch.equal(logits_at(diffusion(lora), t), wanted)
    assert torch.equal(logits_at(diffusion(base, adapter=str(lora)), t), wanted)
    assert not torch.allclose(logits_at(diffusion(base), t), wanted, atol=1e-2)


def test_diffusion_over_a_fully_finetuned_model_is_the_finetuned_model_at_zero(base, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(5)
    for weight in lm.parameters():
        weight.data.add_(0.01 * torch.randn_like(weight))
    lm.save_pretrained(tmp_path / "full")
    with torch.no_grad():
        wanted = lm.eval()(random_tokens(2, 7)).logits
    assert torch.equal(logits_at(diffusion(tmp_path / "full"), 0.0), wanted)


@pytest.mark.parametrize("how", ["folder", "adapter"])
def test_diffusion_over_a_lora_is_saved_and_loaded(base, finetuned, tmp_path, how):
    lora, _ = finetuned
    model = diffusion(lora) if how == "folder" else diffusion(base, adapter=str(lora))
    wanted = logits_at(model, 0.5)
    save(model, tmp_path / "out")
    assert torch.equal(logits_at(load(tmp_path / "out"), 0.5), wanted)
    if how == "folder":
        with pytest.raises(CheckpointError, match="Pass the right model as `base`"):
            load(tmp_path / "out", base=str(base))
    moved = base.rename(tmp_path / "moved")
    if how == "folder":
        with pytest.raises(ConfigError, match=r"no folder .* The PEFT adapter '.*lora' was trained on it: write where"):
            load(tmp_path / "out")
        point(lora, moved)
        assert torch.equal(logits_at(load(tmp_path / "out"), 0.5), wanted)
        moved = lora.rename(tmp_path / "elsewhere")
    assert torch.equal(logits_at(load(tmp_path / "out", base=str(moved)), 0.5), wanted)


def test_an_adapter_is_opened_over_a_base_that_has_moved(base, finetuned, tmp_path):
    lora, merged = finetuned
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"no folder .* The PEFT adapter '.*lora' was trained on it: write where"):
        UnloadedModel(str(lora))
    lm = UnloadedModel(str(lora), base=str(moved)).load("cpu").backbone.lm
    wanted = load_language_model(section(merged)).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in lm.state_dict().items())
    with pytest.raises(ConfigError, match=r"is a whole language model, got base='.*'\. Leave base out"):
        UnloadedModel(str(merged), base=str(moved))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_in_the_wanted_type(base, dtype):
    model = load_language_model(section(base, dtype=dtype))
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
