"""Checkpoints in the layouts of the authors' TESS code become ours and compute what theirs compute."""

import json
import pickle
from pathlib import Path

import pytest
import shared_folders
import torch
from foreign_checkpoints import FLAGS, store, write_tess2
from golden_tess import TIMES, Case, query, slots, take
from safetensors.torch import load_file, save_file
from tiny_models import tiny_lm, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MistralConfig,
    MistralForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.errors import CheckpointError, ConfigError
from l2d_framework.models.checkpoint import load, save
from l2d_framework.models.convert import convert
from l2d_framework.types import Layout


def tess2(folder, family="mistral", *, lm=None, **how):
    """A random TESS 2 checkpoint, and its language model."""
    lm = lm or tiny_lm(family)
    return write_tess2(folder, lm, torch.randn(lm.config.hidden_size, 1), **how), lm


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def nothing_left(folder, *expected):
    return sorted(path.name for path in folder.iterdir()) == sorted(expected)


def golden():
    found = shared_folders.find("L2D_GOLDEN_DIR", "golden")
    return [] if found is None else sorted(path.parent for path in (found / "tess").glob("*/*_meta.json"))


@pytest.fixture(params=golden() or [None], ids=lambda folder: folder.name if folder else "none")
def case(request, golden_dir):
    if request.param is None:
        pytest.skip(f"no cases in {golden_dir / 'tess'}")
    return Case.read(request.param)


def golden_logits(case, model):
    """Logits with a given previous prediction, and what the authors' network returned."""
    io, layout = case.io, case.layout()
    t = 1 - io["noise.timesteps"].float() / TIMES
    asked = query(model, layout, io["noise.noisy_simplex"], t, io["forward.previous_pred"])
    with torch.no_grad():
        return model(asked).logits, take(io["forward.given_prev.logits"], slots(layout)[0])


@pytest.mark.parametrize("shards", [1, 3])
def test_a_converted_tess2_checkpoint_reproduces_the_authors_logits(tmp_path, case, shards):
    name = f"{case.meta['arch'].title()}ForDiffusionLM"
    config = {**case.meta["config"], **FLAGS, "model_type": case.meta["arch"], "architectures": [name]}
    state = load_file(case.folder / f"{case.folder.name}_state.safetensors")
    store(tmp_path / "theirs", config, state, shards=shards)
    found = run("convert", "--from", "tess2", tmp_path / "theirs", tmp_path / "ours")
    assert found.exit_code == 0, found.output
    assert f"l2d generate {tmp_path / 'ours'}" in found.output
    model = load(tmp_path / "ours")
    ours, theirs = golden_logits(case, model)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert torch.equal(ours, golden_logits(case, case.model())[0])
    save(model, tmp_path / "again")
    assert torch.equal(golden_logits(case, load(tmp_path / "again"))[0], ours)


def test_the_settings_are_those_of_the_method(tmp_path):
    source, _ = tess2(tmp_path / "theirs")
    convert(str(source), tmp_path / "ours", reader="tess2")
    manifest = json.loads((tmp_path / "ours" / "l2d.json").read_text())
    assert manifest["schedule"]["name"] == "cosine"
    assert manifest["backbone"]["name"] == "in_place"
    assert manifest["backbone"]["attention"] == "bidirectional"
    assert manifest["parametrization"]["k"] == 5.0
    assert manifest["block_size"] is None
    assert manifest["sampling"]["solver"] == {"name": "renoise"} | manifest["sampling"]["solver"]
    assert manifest["sampling"]["num_inference_steps"] == 100
    stored = json.loads((tmp_path / "ours" / "language_model" / "config.json").read_text())
    assert not FLAGS.keys() & stored.keys()
    assert not (tmp_path / "ours" / "base").exists()


INACTIVE = [
    {"self_condition": "absent", "self_condition_mix_before_weights": "absent"},
    {"self_condition": None, "self_condition_mix_before_weights": False},
    {"self_condition": "logits_mean", "self_condition_mix_before_weights": False},
]


@pytest.mark.parametrize("flags", INACTIVE)
def test_self_conditioning_that_the_stored_flags_switch_off_is_switched_on_and_said(tmp_path, flags):
    source, _ = tess2(tmp_path / "theirs", flags=flags)
    notes = []
    model = convert(str(source), tmp_path / "ours", reader="tess2", tell=notes.append)
    assert model.parametrization.config.self_conditioning == "mean"
    assert len(notes) == 1
    assert "self-conditioning" in notes[0].lower()
    assert notes[0] in (tmp_path / "ours" / "README.md").read_text()


FLAG_CASES = [
    ({"self_condition": "logits_addition"}, lambda m: m.parametrization.config.self_conditioning, "sum"),
    ({"self_condition": "logits_max"}, lambda m: m.parametrization.config.self_conditioning, "max"),
    ({"self_condition": "logits_multiply"}, lambda m: m.parametrization.config.self_conditioning, "product"),
    ({"is_causal": True}, lambda m: m.backbone.config.attention, "causal"),
    ({"simplex_value": 7}, lambda m: m.parametrization.config.k, 7.0),
]


@pytest.mark.parametrize(("flags", "read", "wanted"), FLAG_CASES)
def test_stored_flags_that_name_a_choice_are_followed_without_a_note(tmp_path, flags, read, wanted):
    source, _ = tess2(tmp_path / "theirs", flags=flags)
    notes = []
    assert read(convert(str(source), tmp_path / "ours", reader="tess2", tell=notes.append)) == wanted
    assert read(load(tmp_path / "ours")) == wanted
    assert notes == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"deepmind_conditional": True}, "sets deepmind_conditional=True; only networks without it"),
        ({"self_condition_zeros_after_softmax": True}, "sets self_condition_zeros_after_softmax=True"),
        ({"self_condition_mix_logits_before_weights": True}, "sets self_condition_mix_logits_before_weights=True"),
        ({"disable_timestep_embed": True}, "sets disable_timestep_embed=True"),
        ({"self_condition": "logits"}, "mixes predictions by self_condition='logits'; only logits_mean, "),
        ({"model_type": "absent"}, "names no model_type"),
        ({"model_type": "nonsense"}, "config of .* cannot be read"),
        ({"model_type": "clip_vision_model"}, "no suitable model for the model_type"),
    ],
)
def test_settings_of_another_network_are_refused(tmp_path, flags, message):
    source, _ = tess2(tmp_path / "theirs", flags=flags)
    with pytest.raises(CheckpointError, match=message):
        convert(str(source), tmp_path / "ours", reader="tess2")
    assert nothing_left(tmp_path, "theirs")


def test_the_type_of_the_weights_is_kept(tmp_path):
    source, lm = tess2(tmp_path / "theirs", lm=tiny_lm("mistral").bfloat16())
    convert(str(source), tmp_path / "ours", reader="tess2")
    loaded = load(tmp_path / "ours").backbone.lm
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in lm.state_dict().items())


def test_a_table_with_more_rows_than_tokens_keeps_them_and_one_with_fewer_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    for extra in (5, -1):
        source, _ = tess2(tmp_path / f"{extra}", lm=tiny_lm("mistral", vocab_size=len(tokenizer) + extra))
        tokenizer.save_pretrained(source)
    model = convert(str(tmp_path / "5"), tmp_path / "ours", reader="tess2")
    assert model.backbone.vocab_size == len(tokenizer) + 5
    text = "Hello <|turn|> world"
    stored = AutoTokenizer.from_pretrained(tmp_path / "ours" / "language_model")
    assert (
        stored(text)["input_ids"] == tokenizer(text)["input_ids"] == load(tmp_path / "ours").tokenizer(text).input_ids
    )
    with pytest.raises(CheckpointError, match=f"has {len(tokenizer)} tokens and its embedding table only"):
        convert(str(tmp_path / "-1"), tmp_path / "refused", reader="tess2")
    assert not (tmp_path / "refused").exists()


def test_a_converted_checkpoint_answers_conversations_in_the_tulu_format(tmp_path):
    source, _ = tess2(tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(source)
    model = convert(str(source), tmp_path / "ours", reader="tess2")
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": " Hi "}],
        chat_template=load(tmp_path / "ours").origin.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == "<s><|user|>\nHi\n<|assistant|>\n"
    options = ("--num-inference-steps", 2, "--max-new-tokens", 4)
    found = run("generate", tmp_path / "ours", "--chat", "--prompt", "Hi", *options)
    assert found.exit_code == 0, found.output


def headless(state):
    del state["lm_head.weight"]


def test_a_llama_checkpoint_without_its_lost_head_is_refused_with_the_reason(tmp_path):
    source, _ = tess2(tmp_path / "theirs", "llama", change=headless)
    with pytest.raises(
        CheckpointError, match=r"lacks 'lm_head.weight'. The authors' Llama class leaves it out when it"
    ):
        convert(str(source), tmp_path / "ours", reader="tess2")
    assert nothing_left(tmp_path, "theirs")


@pytest.mark.parametrize("added", [0, 2])
def test_the_lost_head_can_come_from_the_base_and_the_user_is_told(tmp_path, added):
    base = tiny_lm("llama", seed=1)
    base.save_pretrained(tmp_path / "base")
    size = base.config.vocab_size
    source, lm = tess2(tmp_path / "theirs", lm=tiny_lm("llama", vocab_size=size + added), change=headless)
    found = run("convert", "--from", "tess2", source, tmp_path / "ours", "--base", tmp_path / "base")
    assert found.exit_code == 0, found.output
    note = f"lm_head.weight was lost when the checkpoint was saved and comes from {tmp_path / 'base'}"
    assert note in found.output
    assert note in (tmp_path / "ours" / "README.md").read_text()
    assert ("added tokens" in found.output) == bool(added)
    state = load(tmp_path / "ours").backbone.lm.state_dict()
    head, theirs = state.pop("lm_head.weight"), base.lm_head.weight
    assert torch.equal(head[:size], theirs)
    torch.testing.assert_close(head[size:], theirs.mean(0).expand(added, -1))
    assert all(torch.equal(weight, lm.state_dict()[name]) for name, weight in state.items())


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("qwen2", {}, "has model_type='qwen2', .* has 'llama'"),
        ("llama", {"hidden_size": 64}, "has hidden_size=64, .* has 32"),
        ("llama", {"vocab_size": 300}, "has vocab_size=300, .* has 260"),
    ],
)
def test_a_base_that_cannot_have_been_the_start_is_refused(tmp_path, family, config, message):
    tiny_lm(family, **config).save_pretrained(tmp_path / "base")
    source, _ = tess2(tmp_path / "theirs", "llama", change=headless)
    with pytest.raises(ConfigError, match=message):
        convert(str(source), tmp_path / "ours", reader="tess2", base=str(tmp_path / "base"))
    assert nothing_left(tmp_path, "theirs", "base")


def test_a_base_that_is_not_needed_is_refused(tmp_path):
    source, _ = tess2(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"holds its whole language model, got base='somewhere'. Leave it out"):
        convert(str(source), tmp_path / "ours", reader="tess2", base="somewhere")


def test_tied_llama_weights_need_no_head(tmp_path):
    source, lm = tess2(tmp_path / "theirs", lm=tiny_lm("llama", tie_word_embeddings=True), change=headless)
    convert(str(source), tmp_path / "ours", reader="tess2")
    found = load(tmp_path / "ours").backbone.lm
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.lm_head.weight, lm.lm_head.weight)


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path):
    def change(state):
        state["lm_head.weight"] = state["lm_head.weight"] + 1

    source, _ = tess2(tmp_path / "theirs", lm=tiny_lm("llama", tie_word_embeddings=True), change=change)
    with pytest.raises(
        CheckpointError, match=r"'lm_head.weight' in .* differs from 'model.embed_tokens.weight', though"
    ):
        convert(str(source), tmp_path / "ours", reader="tess2")
    assert nothing_left(tmp_path, "theirs")


def test_rotary_frequencies_of_old_files_are_dropped(tmp_path):
    def change(state):
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    source, _ = tess2(tmp_path / "theirs", change=change)
    convert(str(source), tmp_path / "ours", reader="tess2")


TENSORS = [
    (lambda s: s.pop("timestep_embed.weight"), "no timestep_embed.weight. Give the folder of a diffusion model"),
    (lambda s: s.update({"timestep_embed.bias": torch.zeros(32)}), r"unexpected \['timestep_embed.bias'\]"),
    (
        lambda s: s.update({"timestep_embed.weight": torch.zeros(31, 1)}),
        r"missing \[\('backbone.time.weight', 32, 1\)\]",
    ),
    (lambda s: s.pop("model.norm.weight"), r"incomplete: missing \['model.norm.weight'\]"),
    (lambda s: s.pop("lm_head.weight"), r"incomplete: missing \['lm_head.weight'\]"),
    (lambda s: s.update({"model.extra": torch.zeros(2)}), r"unexpected \['model.extra'\]"),
    (lambda s: s.update({"model.norm.weight": torch.zeros(7)}), r"another shape .* \['model.norm.weight'\]"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_missing_unknown_and_misshapen_tensors_are_named_before_anything_is_written(tmp_path, change, message):
    source, _ = tess2(tmp_path / "theirs", change=change)
    with pytest.raises(CheckpointError, match=message):
        convert(str(source), tmp_path / "ours", reader="tess2")
    assert nothing_left(tmp_path, "theirs")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget(path):
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


FILES = [
    ("config.json", Path.unlink, "config.json' is missing or damaged"),
    ("config.json", cut, "config.json' is missing or damaged"),
    ("config.json", lambda path: path.write_text("[]"), "holds no fields"),
    ("model-00002-of-00003.safetensors", Path.unlink, r"lacks 1 shards, such as 'model-00002-of-00003.safetensors'"),
    ("model-00002-of-00003.safetensors", cut, "is damaged or holds more than weights"),
    ("model.safetensors.index.json", Path.unlink, "holds no model.safetensors or pytorch_model.bin, nor shards"),
    ("model.safetensors.index.json", lambda path: path.write_text("{}"), "maps no weights to files"),
    ("model.safetensors.index.json", forget, "lacks 'model.ghost', which the index promises"),
]


@pytest.mark.parametrize(("name", "harm", "message"), FILES)
def test_missing_and_damaged_files_are_named(tmp_path, name, harm, message):
    source, _ = tess2(tmp_path / "theirs", shards=3)
    harm(source / name)
    with pytest.raises(CheckpointError, match=message):
        convert(str(source), tmp_path / "ours", reader="tess2")
    assert nothing_left(tmp_path, "theirs")


def test_a_shard_named_outside_the_folder_is_not_read(tmp_path):
    source, _ = tess2(tmp_path / "theirs", shards=2)
    save_file({"model.extra": torch.zeros(2)}, tmp_path / "secret.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra"] = "../secret.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks 1 shards, such as '../secret.safetensors'"):
        convert(str(source), tmp_path / "ours", reader="tess2")


@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_of_plain_weights_are_read(tmp_path, shards):
    source, lm = tess2(tmp_path / "theirs", suffix="bin", shards=shards)
    found = convert(str(source), tmp_path / "ours", reader="tess2").backbone.lm.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in lm.state_dict().items())


class Code:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    source, _ = tess2(tmp_path / "theirs", suffix="bin")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Code()}, protocol=2))
    with pytest.raises(CheckpointError, match="is damaged or holds more than weights"):
        convert(str(source), tmp_path / "ours", reader="tess2")
    torch.save({"model": {"norm": torch.zeros(2)}}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no named weights"):
        convert(str(source), tmp_path / "ours", reader="tess2")


def test_what_stands_at_the_target_is_never_touched(tmp_path):
    source, _ = tess2(tmp_path / "theirs")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(ConfigError, match=r"is not empty. Give a new folder"):
            convert(str(source), tmp_path / name, reader="tess2")
    assert (tmp_path / "file").read_text() == "mine"
    convert(str(source), tmp_path / "empty", reader="tess2")
    load(tmp_path / "empty")


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    source, _ = tess2(tmp_path / "theirs")
    monkeypatch.setattr("l2d_framework.models.convert.save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "ours", reader="tess2")
    assert nothing_left(tmp_path, "theirs")


def test_files_and_folder_have_the_rights_of_any_other(tmp_path):
    source, _ = tess2(tmp_path / "theirs")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    convert(str(source), tmp_path / "ours", reader="tess2")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "other").stat().st_mode
    wanted = (tmp_path / "other" / "file").stat().st_mode
    assert all(path.stat().st_mode == wanted for path in (tmp_path / "ours").rglob("*") if path.is_file())


def reward(folder, *, change=None, **config):
    """A random reward model as TRL saves it."""
    fields = {k: v for k, v in tiny_lm("mistral").config.to_diff_dict().items() if k != "model_type"}
    model = MistralForSequenceClassification(MistralConfig(**fields, num_labels=1)).eval()
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    if change:
        change(state)
    settings = {**model.config.to_diff_dict(), "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, **config}
    return store(folder, {**settings, "architectures": ["MistralForSequenceClassification"]}, state), model


def test_a_converted_reward_model_is_the_model_and_loads_as_a_sequence_classifier(tmp_path):
    source, model = reward(tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(source)
    found = run("convert", "--from", "tess2-reward", source, tmp_path / "ours")
    assert found.exit_code == 0, found.output
    assert f"--guidance reward_gradient --set guidance.0.model={tmp_path / 'ours'}" in found.output
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert loaded.config.num_labels == 1
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "ours")) == len(tiny_tokenizer())
    modes = {path.stat().st_mode for path in (tmp_path / "ours").iterdir()}
    assert len(modes) == 1
    assert nothing_left(tmp_path, "theirs", "ours")


def test_a_converted_reward_model_reproduces_the_authors_rewards(tmp_path, case):
    state = load_file(case.folder / "reward_state.safetensors")
    store(tmp_path / "theirs", {**case.meta["reward_config"], "model_type": "mistral"}, state)
    model = convert(str(tmp_path / "theirs"), tmp_path / "ours", reader="tess2-reward")
    embedded = model.get_input_embeddings()(case.io["input_ids"])
    with torch.no_grad():
        found = model.score(model.model(inputs_embeds=embedded).last_hidden_state[:, -1])[:, 0]
    torch.testing.assert_close(found, case.io["reward.hard_reward_last_position"].flatten(), rtol=0, atol=1e-4)


def test_converted_models_guide_each_other(tmp_path):
    for make, reader, name in ((tess2, "tess2", "model"), (reward, "tess2-reward", "judge")):
        source, _ = make(tmp_path / f"their_{name}")
        tiny_tokenizer().save_pretrained(source)
        convert(str(source), tmp_path / name, reader=reader)
    options = ("--num-inference-steps", 2, "--max-new-tokens", 4, "--guidance", "reward_gradient")
    found = run(
        "generate", tmp_path / "model", "--prompt", "Hi", *options, "--set", f"guidance.0.model={tmp_path / 'judge'}"
    )
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s.pop("score.weight"), {}, "it has no score.weight.$"),
        (lambda s: s.update({"score.weight": torch.zeros(2, 32)}), {}, "has 2 outputs; a reward model has one"),
        (None, {"id2label": {"0": "bad", "1": "good"}}, "has 2 outputs; a reward model has one"),
        (None, {"num_labels": 3}, "has 3 outputs; a reward model has one"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(2)}), {}, r"unexpected \['lm_head.weight'\]"),
        (lambda s: s.pop("model.norm.weight"), {}, r"missing \['model.norm.weight'\]"),
    ],
)
def test_what_is_no_reward_model_is_refused(tmp_path, change, config, message):
    source, _ = reward(tmp_path / "theirs", change=change, **config)
    with pytest.raises(CheckpointError, match=message):
        convert(str(source), tmp_path / "ours", reader="tess2-reward")
    assert nothing_left(tmp_path, "theirs")


def test_a_reward_model_has_no_base(tmp_path):
    source, _ = reward(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="is a reward model, which has no base, got base='somewhere'"):
        convert(str(source), tmp_path / "ours", reader="tess2-reward", base="somewhere")


def tess1(folder, *, flags=None, change=None, **kwargs):
    """A random TESS 1 checkpoint, and its language model."""
    sizes = {k: v for k, v in tiny_lm("llama").config.to_diff_dict().items() if k.endswith("_size") or "num_hid" in k}
    config = RobertaConfig(
        **sizes,
        num_attention_heads=4,
        max_position_embeddings=40,
        type_vocab_size=1,
        pad_token_id=1,
        hidden_dropout_prob=0,
    )
    lm = RobertaForMaskedLM(config).eval()
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    state = {name: weight.clone() for name, weight in lm.state_dict().items() if "decoder" not in name}
    state["vocab_to_hidden_dim_embed.weight"] = state["roberta.embeddings.word_embeddings.weight"].T
    state["roberta.embeddings.position_ids"] = torch.arange(40)[None]
    state["timestep_embed.weight"], state["timestep_embed.bias"] = torch.randn(32, 1), torch.randn(32)
    if change:
        change(state)
    fields = {**config.to_diff_dict(), **FLAGS, "architectures": ["RobertaForDiffusionLM"], **(flags or {})}
    return store(folder, fields, state, **kwargs), lm


def roberta_logits(lm, state, layout, x, t, previous):
    """What the TESS 1 network computes, from its definition."""
    table = lm.get_input_embeddings().weight
    mixed = 0.5 * (x.softmax(-1) + previous.softmax(-1)) @ table
    mark = (1 - t)[..., None] @ state["timestep_embed.weight"].T + state["timestep_embed.bias"]
    inputs = torch.where((layout.blocks >= 1)[..., None], mixed + mark, table[layout.tokens])
    return lm(inputs_embeds=inputs).logits


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("k", [None, 3.0])
def test_a_converted_tess1_checkpoint_computes_what_its_definition_says(tmp_path, suffix, k):
    state = {}
    flags = {} if k is None else {"simplex_value": k}
    source, lm = tess1(tmp_path / "theirs", flags=flags, change=lambda theirs: state.update(theirs), suffix=suffix)
    found = run("convert", "--from", "tess1", source, tmp_path / "ours")
    assert found.exit_code == 0, found.output
    model = load(tmp_path / "ours")
    assert model.parametrization.config.k == (k or 5.0)
    tokens = torch.randint(3, lm.config.vocab_size, (2, 9))
    blocks = torch.ones_like(tokens)
    blocks[0, 2:5] = 0
    x, previous = torch.randn(2, 2, 9, lm.config.vocab_size) * 5
    t = torch.rand(2, 1).expand(2, 9)
    layout = Layout(tokens, blocks)
    positions, _ = slots(layout)
    with torch.no_grad():
        ours = model(query(model, layout, x, t, previous)).logits
        theirs = roberta_logits(lm, state, layout, x, t, previous)
    torch.testing.assert_close(ours, take(theirs, positions), rtol=0, atol=1e-4)


def words(state):
    """Of two names for one storage, keep the other."""
    del state["roberta.embeddings.word_embeddings.weight"]


def test_either_name_of_the_shared_table_serves(tmp_path):
    source, lm = tess1(tmp_path / "theirs", change=words)
    model = convert(str(source), tmp_path / "ours", reader="tess1")
    assert torch.equal(model.backbone.table(), lm.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (
            lambda s: s.update({"vocab_to_hidden_dim_embed.weight": torch.zeros(32, 260)}),
            {},
            "is not its embedding table, so the network embeds states otherwise than tokens",
        ),
        (lambda s: s.pop("timestep_embed.bias"), {}, "is no TESS 1 checkpoint: it needs .*timestep_embed.bias"),
        (lambda s: s.update({"project.weight": torch.zeros(2)}), {}, r"unexpected \['project.weight'\]"),
        (
            None,
            {"self_condition": "logits_max", "self_condition_mix_before_weights": False},
            "mixtures that are not linear can be converted only if self_condition_mix_before_weights is set",
        ),
    ],
)
def test_tess1_checkpoints_that_cannot_be_expressed_are_refused(tmp_path, change, flags, message):
    source, _ = tess1(tmp_path / "theirs", change=change, flags=flags)
    with pytest.raises(CheckpointError, match=message):
        convert(str(source), tmp_path / "ours", reader="tess1")
    assert nothing_left(tmp_path, "theirs")


@pytest.mark.parametrize(
    ("make", "reader", "hint"),
    [
        (tess1, "tess2", "Use --from tess1"),
        (tess2, "tess1", "use --from tess2"),
        (reward, "tess2", "Use --from tess2-reward"),
        (tess2, "tess2-reward", "Use --from tess2"),
    ],
)
def test_another_kind_of_checkpoint_is_answered_with_its_format(tmp_path, make, reader, hint):
    source, _ = make(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=hint):
        convert(str(source), tmp_path / "ours", reader=reader)
