"""What is written, what is read back, and what is refused before any weights are loaded."""

import json
import os
import shutil
import stat
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from diffusion_models import NETWORK, SPACE, all_known, ask_everywhere, diffusion_lm, random_tokens
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import CHAT_TEMPLATE, tiny_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM

import l2d_framework as l2d
from l2d_framework.config import check_runs, parse_run
from l2d_framework.errors import CheckpointError, ConfigError, L2DError, MissingModelError, PluginError
from l2d_framework.evaluation.text.judge import open_tokenizer
from l2d_framework.models import checkpoint
from l2d_framework.models.checkpoint import build_model, load, load_weights, push_to_hub, save
from l2d_framework.models.manifest import opening_base, read_manifest, sealed
from l2d_framework.models.unloaded import UnloadedModel
from l2d_framework.types import Query

BOTH = pytest.mark.parametrize("variant", ["lora", "full"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_lm().save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


def build(base, variant="lora", seed=0, **fields):
    """A model as a run file makes it, each own weight moved."""
    run = {
        "model": {"base": str(base)},
        "schedule": {"name": "linear", "minimum_noise": 0.125},
        "parametrization": {"name": "embedding", **SPACE},
        "backbone": {"name": "two_stream", "variant": variant, "num_classes": 2, **NETWORK},
        "classes": ["math", "code"],
        "sampling": {"num_inference_steps": 5, "seed": 11},
        **fields,
    }
    model = build_model(parse_run(run))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.own_parameters().values():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@pytest.fixture
def saved(base, tmp_path):
    save(build(base), tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(checkpoint, "load_language_model", lambda *a, **k: pytest.fail("weights were loaded"))


def logits(model):
    query: Query = ask_everywhere(model, all_known(random_tokens(2, 7)))
    query = query.replace(condition=torch.tensor([[0], [1]]).expand(2, 7))
    with torch.no_grad():
        return model(query).logits


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@BOTH
def test_a_saved_model_comes_back_bit_for_bit(base, tmp_path, variant):
    model = build(base, variant)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    for name, weight in model.own_parameters().items():
        assert torch.equal(loaded.own_parameters()[name], weight), name
    assert not loaded.training


def test_a_loaded_model_knows_what_it_was_made_from(base, saved):
    model, loaded = build(base), load(saved)
    assert loaded.schedule == model.schedule
    assert loaded.parametrization.config == model.parametrization.config
    assert loaded.backbone.config == model.backbone.config
    assert loaded.block_size == model.block_size
    assert loaded.origin == model.origin
    assert loaded.sampling().seed == 11
    assert loaded.class_ids(["code", None]).tolist() == [1, -1]
    texts = ["Hello", "a longer prompt"]
    options = {"max_new_tokens": 3, "classes": ["math", None], "guidance_scale": 2.0}
    assert torch.equal(loaded.generate(texts, **options).sequences, model.generate(texts, **options).sequences)


def test_a_chat_template_of_the_run_is_kept(base, tmp_path, saved_tiny_lm):
    folder = saved_tiny_lm()
    data = {"train": [{"path": "json"}], "chat_template": CHAT_TEMPLATE.replace("assistant", "bot")}
    save(build(folder, data=data), tmp_path / "out")
    loaded = load(tmp_path / "out")
    conversation = [[{"role": "user", "content": "hi"}]]
    found = loaded.generate(conversation, max_new_tokens=1)
    assert "<|turn|>bot" in loaded.tokenizer.decode(found.sequences[0])


@BOTH
def test_the_folder_holds_the_own_weights_and_no_others(base, tmp_path, variant):
    model = build(base, variant)
    save(model, tmp_path / "out")
    wanted = {"l2d.json", "diffusion.safetensors", "README.md"}
    if variant == "lora":
        wanted |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files(tmp_path / "out") == wanted
    stored = [load_file(path) for path in (tmp_path / "out").rglob("*.safetensors")]
    own = model.own_parameters()
    assert sum(len(part) for part in stored) == len(own)
    assert sum(weight.numel() for part in stored for weight in part.values()) == sum(w.numel() for w in own.values())


def test_everybody_may_read_what_was_written(saved):
    modes = {stat.S_IMODE((saved / name).stat().st_mode) for name in files(saved)}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_the_adapter_is_one_that_peft_loads_onto_the_base(base, saved, recwarn):
    lm = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(lm, str(saved / "adapter"))
    assert not [w for w in recwarn if "missing" in str(w.message)]
    state = load_file(saved / "adapter" / "adapter_model.safetensors")
    found = {name.replace(".default", ""): weight for name, weight in adapted.state_dict().items() if "lora_" in name}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2.0)
    assert config["base_model_name_or_path"] == str(base)


def test_the_manifest_is_complete_json(base, saved):
    manifest = json.loads((saved / "l2d.json").read_text())
    assert manifest["format"] == 2
    assert manifest["l2d_framework"] == version("l2d-framework")
    assert manifest["model"]["base"] == str(base)
    assert manifest["classes"] == ["math", "code"]
    assert manifest["schedule"] == {**manifest["schedule"], "name": "linear", "minimum_noise": 0.125}
    assert manifest["sampling"]["seed"] == 11
    # The model card may be edited.
    assert set(manifest["files"]) == files(saved) - {"l2d.json", "README.md"}


def test_the_model_card_says_what_it_is_and_how_to_use_it(base, tmp_path):
    model = build(base)
    save(model, tmp_path, notes="## Results\n\nGood.")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: l2d-framework")
    assert f"{sum(w.numel() for w in model.own_parameters().values()):,}" in card
    assert "l2d.load(" in card
    assert card.rstrip().endswith("Good.")
    # A folder is no address on the hub.
    assert "base_model:" not in card


def test_the_package_offers_saving_and_loading(base, tmp_path):
    l2d.save(build(base), tmp_path)
    assert isinstance(l2d.load(tmp_path), l2d.DiffusionLM)


def test_the_language_model_is_loaded_in_the_wanted_type_and_its_path_folded_in_it(saved):
    model = load(saved, dtype="bfloat16")
    assert {weight.dtype for weight in model.backbone.lm.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in model.own_parameters().values()} == {torch.float32}
    assert logits(model).isfinite().all()
    model.backbone.merge()
    folded = [module.folded._made[1] for module in model.backbone.modules() if hasattr(module, "foldable")]
    assert {matrix.dtype for matrix in folded} == {torch.bfloat16}
    assert logits(model).isfinite().all()
    assert {weight.dtype for weight in model.own_parameters().values()} == {torch.float32}


def test_a_base_that_has_moved_is_found_where_the_user_says(saved, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    wanted = logits(load(saved))
    loaded = load(saved, base=str(moved))
    assert torch.equal(logits(loaded), wanted)
    assert loaded.origin.model.base == str(moved)


def test_a_relative_path_to_the_base_leads_on_from_where_it_was_trained_and_from_the_checkpoint(
    base, tmp_path, monkeypatch
):
    here = tmp_path / "here"
    shutil.copytree(base, here / "models" / "x")
    (tmp_path / "there" / "models" / "x").mkdir(parents=True)  # of something else
    monkeypatch.chdir(here)
    save(build("models/x"), tmp_path / "out")
    wanted = logits(load(tmp_path / "out"))
    for folder in (here, tmp_path / "out", tmp_path / "there"):
        monkeypatch.chdir(folder)
        model = load(tmp_path / "out")
        assert torch.equal(logits(model), wanted)
        assert UnloadedModel(str(tmp_path / "out")).reference == model.origin.model
    assert model.origin.model.base == str(here / "models" / "x")
    save(model, tmp_path / "again")
    assert read_manifest(tmp_path / "again")["trained_in"] is None
    moved = shutil.move(here, tmp_path / "moved")
    for opened in (load, UnloadedModel):
        places = rf"It was looked for from here, from '{here}' and '{tmp_path}/out'\. '.*out' was trained over it"
        with pytest.raises(ConfigError, match=places):
            opened(str(tmp_path / "out"))
        (tmp_path / "out" / "models").symlink_to(moved / "models")
        opened(str(tmp_path / "out"))
        (tmp_path / "out" / "models").unlink()


def test_where_a_base_and_its_adapter_were_looked_for_is_said_once():
    manifest = {"model": {"base": "models/x", "adapter": "models/y"}, "trained_in": "/there"}
    with pytest.raises(MissingModelError) as caught, opening_base("out", None, manifest):
        raise MissingModelError("It is gone.")
    assert str(caught.value).startswith("It is gone. It was looked for from here, from '/there' and 'out'. 'out' was ")


def test_a_base_that_is_gone_is_asked_for_by_the_option_that_names_it(saved, base, tmp_path):
    base.rename(tmp_path / "moved")
    try:
        base.mkdir()
        for opened in (load, UnloadedModel):
            # A relative path, such as '.', may be a folder of something else.
            with pytest.raises(ConfigError, match=r"holds no config\.json.*/out' was trained over it\. .* now: `base`"):
                opened(str(saved))
        base.rmdir()
        for opened in (load, UnloadedModel):
            with pytest.raises(ConfigError, match=r"There is no folder .*/out' was trained over it\. .* now: `base`"):
                opened(str(saved))
            with pytest.raises(ConfigError, match=r"There is no folder '/none'\. [^`]*$"):
                opened(str(saved), base="/none")
            opened(str(saved), base=str(tmp_path / "moved"))
        with pytest.raises(ConfigError, match=r"No tokenizer .* Name the folder or hub id of a language model"):
            open_tokenizer(str(saved))
    finally:
        (tmp_path / "moved").rename(base)


def test_a_wrong_base_is_refused_by_its_fingerprint(saved, saved_tiny_lm, no_weights):
    with pytest.raises(CheckpointError, match=r"has fingerprint \w{12}, but this checkpoint was trained on \w{12}"):
        load(saved, base=str(saved_tiny_lm(seed=1)))


def test_a_base_that_was_trained_further_is_refused(saved, base, tmp_path, no_weights):
    moved = shutil.copytree(base, tmp_path / "moved")
    weights = load_file(moved / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] += 1e-4
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="Pass the right model as `base`"):
        load(saved, base=str(moved))


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "corrupted":
        path.write_bytes(content[:-3] + b"xyz")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "corrupted", "missing"])
@pytest.mark.parametrize("name", ["diffusion.safetensors", "adapter/adapter_model.safetensors"])
def test_damaged_weights_are_refused_by_name(saved, no_weights, name, how):
    damage(saved / name, how)
    with pytest.raises(CheckpointError, match=rf"{name}' is missing, truncated or changed since it was saved"):
        load(saved)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": "x", "files": {}}',
        '{"format": 1, "files": {}}',
        '{"format": 1, "files": 3}',
    ],
)
def test_a_damaged_manifest_is_refused(saved, no_weights, text):
    (saved / "l2d.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"l2d.json' is damaged"):
        load(saved)


def test_a_newer_format_is_refused(saved, no_weights):
    manifest = json.loads((saved / "l2d.json").read_text())
    (saved / "l2d.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(CheckpointError, match=r"checkpoint format 3; this version .* reads up to 2. Upgrade"):
        load(saved)


def test_a_folder_without_a_manifest_is_refused_with_the_way_out(base, no_weights):
    with pytest.raises(CheckpointError, match=r"holds no l2d.json, so it is no l2d-framework checkpoint.*l2d convert"):
        load(base)


def test_a_component_that_is_not_installed_is_named(saved, no_weights):
    manifest = json.loads((saved / "l2d.json").read_text())
    (saved / "l2d.json").write_text(json.dumps(sealed(manifest | {"schedule": {"name": "liner"}})))
    with pytest.raises(PluginError, match="'linear'"):
        load(saved)


def test_an_interrupted_save_is_told_from_a_checkpoint(base, saved, monkeypatch):
    first, real, count = logits(load(saved)), os.replace, len(files(saved))
    for allowed in range(count):
        save(build(base), saved)
        done = []

        def replace(source, target, allowed=allowed, done=done):
            if len(done) == allowed:
                raise KeyboardInterrupt
            done.append(target)
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                save(build(base, seed=1), saved)
        assert files(saved) == {
            "l2d.json",
            "diffusion.safetensors",
            "README.md",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        }
        if any(str(path).endswith(".safetensors") for path in done):
            with pytest.raises(CheckpointError, match="changed since it was saved"):
                load(saved)
        else:
            assert torch.equal(logits(load(saved)), first)
    assert count == 5


def test_an_interrupted_first_save_is_no_checkpoint(base, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(build(base), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds no l2d\.json"):
        load(tmp_path / "out")


def test_other_files_of_the_folder_are_left_alone(base, saved):
    (saved / "run.json").write_text("{}")
    (saved / "adapter" / "notes.txt").write_text("mine")
    save(build(base), saved)
    assert (saved / "run.json").read_text() == "{}"
    assert (saved / "adapter" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("variant", ["full", "full_random"])
def test_weights_of_another_shape_are_refused(base, saved, variant):
    other = build(base, variant)
    before = {name: weight.clone() for name, weight in other.own_parameters().items()}
    with pytest.raises(CheckpointError, match="tensors are missing, superfluous or of another shape, such as '"):
        load_weights(other, saved)
    assert all(torch.equal(weight, before[name]) for name, weight in other.own_parameters().items())


def test_weights_go_into_a_model_of_the_same_shape(base, saved):
    other = build(base, seed=5)
    before = {name: weight.clone() for name, weight in other.backbone.lm.named_parameters()}
    assert not torch.equal(logits(other), logits(load(saved)))
    load_weights(other, saved)
    assert torch.equal(logits(other), logits(load(saved)))
    assert all(torch.equal(weight, before[name]) for name, weight in other.backbone.lm.named_parameters())


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_a_model_that_has_generated_is_saved_as_one_that_has_not(base, tmp_path, variant):
    model = build(base, variant)
    save(model, tmp_path / "before")
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, num_inference_steps=3)
    save(model, tmp_path / "after")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        if (tmp_path / "before" / name).exists():
            assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_a_model_that_was_put_together_by_hand_is_loaded_onto_the_base_it_is_given(base, tmp_path):
    model = diffusion_lm(AutoModelForCausalLM.from_pretrained(base).eval(), classes=("a", "b"))
    save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"names no base model. Pass its folder or hub id as `base`"):
        load(tmp_path)
    assert torch.equal(logits(load(tmp_path, base=str(base))), logits(model))


def test_fresh_weights_follow_the_seed_of_the_run(base):
    run = {
        "model": {"base": str(base)},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding", **SPACE},
        "backbone": {"name": "two_stream", **NETWORK},
    }

    def weights(seed):
        torch.manual_seed(seed + 100)
        before = torch.get_rng_state()
        found = build_model(parse_run({**run, "seed": seed})).own_parameters()
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([weight.flatten() for weight in found.values()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


class Hub:
    """Remembers what was asked of it."""

    def __init__(self):
        self.created, self.uploaded = [], []

    def __call__(self):
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.created.append((repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path):
        found = {name: (Path(folder_path) / name).read_bytes() for name in files(Path(folder_path))}
        self.uploaded.append((repo_id, found))
        return "https://hub/commit"


def test_exactly_the_saved_folder_is_pushed(base, saved, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(checkpoint, "HfApi", hub)
    address = push_to_hub(build(base), "me/model", private=True, notes="hello")
    assert address == "https://hub/commit"
    assert hub.created == [("me/model", True, True)]
    (repo, found), names = hub.uploaded[0], files(saved)
    assert repo == "me/model"
    assert found.keys() == names
    assert all(found[name] == (saved / name).read_bytes() for name in names - {"README.md"})
    assert b"hello" in found["README.md"]


def test_a_checkpoint_on_the_hub_is_loaded_by_its_id(saved, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "l2d_framework.base_model.snapshot_download",
        lambda path, revision, allow_patterns: asked.append((path, revision)) or str(saved),
    )
    loaded = load("me/model", revision="v1")
    assert asked[0] == ("me/model", "v1")
    assert torch.equal(logits(loaded), logits(load(saved)))


def test_reading_a_manifest_checks_the_weights_first(saved):
    assert read_manifest(saved)["classes"] == ["math", "code"]
    damage(saved / "diffusion.safetensors", "truncated")
    with pytest.raises(CheckpointError):
        read_manifest(saved)


def test_the_language_model_inside_a_half_precision_checkpoint_is_the_one_on_disk(base, tmp_path):
    save(build(base, model={"base": str(base), "dtype": "bfloat16"}), tmp_path / "out")
    model = load(tmp_path / "out")
    tokens = random_tokens(1, 60)
    wanted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(model.backbone.lm(tokens).logits, wanted(tokens).logits)
    assert model.backbone.lm.get_decoder().rotary_emb.inv_freq.dtype == torch.float32


def test_loading_and_saving_again_loses_nothing(base, tmp_path):
    save(build(base, model={"base": str(base), "dtype": "bfloat16"}), tmp_path / "one")
    save(load(tmp_path / "one"), tmp_path / "two")
    one, two = (load_file(tmp_path / name / "diffusion.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)


def _in_place(base, **fields):
    parts = {"schedule": {"name": "cosine"}, "parametrization": {"name": "simplex"}, "backbone": {"name": "in_place"}}
    return parse_run({"model": {"base": str(base)}, **parts, **fields})


def test_a_run_goes_on_from_a_diffusion_model_that_holds_its_language_model(base, tmp_path):
    first = _in_place(base, output_dir=str(tmp_path / "one"))
    second = _in_place(tmp_path / "one", seed=7)
    check_runs([first, second])
    model = build_model(first)
    with torch.no_grad():
        for weight in model.own_parameters().values():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    save(model, tmp_path / "one")
    check_runs([second])
    found = build_model(second)
    assert found.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    for name, weight in found.own_parameters().items():
        assert torch.equal(weight, model.own_parameters()[name]), name


def test_a_model_that_began_at_random_keeps_what_it_has_learnt(base, tmp_path):
    model = build_model(_in_place(base, backbone={"name": "in_place", "initialization": "random"}))
    save(model, tmp_path)
    found = load(tmp_path).own_parameters()
    assert all(torch.equal(weight, found[name]) for name, weight in model.own_parameters().items())


def test_a_run_refuses_a_diffusion_model_of_another_kind(base, tmp_path):
    save(build_model(_in_place(base)), tmp_path)
    parts = {"parametrization": {"name": "embedding", **SPACE}, "backbone": {"name": "two_stream", **NETWORK}}
    with pytest.raises(CheckpointError, match="diffusion model with parametrization 'simplex', but the run asks for"):
        build_model(_in_place(tmp_path, schedule={"name": "linear"}, **parts))


def test_a_type_may_be_named_or_given(saved):
    assert load(saved, dtype=torch.bfloat16).backbone.lm.dtype == torch.bfloat16
    with pytest.raises(L2DError, match="dtype"):
        load(saved, dtype="bf16")
