"""Bases whose vocabulary grew: PEFT adapters with tokens of their own, tokenizers longer than the embedding table."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusion_models import NETWORK, SPACE, all_known, ask_everywhere, random_tokens
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB_SIZE, tiny_lm, tiny_tokenizer
from tiny_runs import language_model_run, write_base, write_sums
from transformers import AutoModelForCausalLM

from l2d_framework.base_model import (
    check_vocabulary,
    empty_language_model,
    load_config,
    load_language_model,
    load_tokenizer,
    locate,
)
from l2d_framework.config import ModelSection, check_run, parse_run
from l2d_framework.errors import CheckpointError, ConfigError
from l2d_framework.models.checkpoint import build_model, load, save
from l2d_framework.training.run import train_runs

NEW = ["<tool>", "</tool>"]
ROWS = VOCAB_SIZE + 4
"""Rows after training: two more than the tokenizer has tokens, as padding to a multiple leaves them."""

HOW = {
    "lora": {},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "input_alone": {"modules_to_save": ["embed_tokens"]},
    "trainable_token_indices": {"trainable_token_indices": {"embed_tokens": [VOCAB_SIZE, VOCAB_SIZE + 1]}},
}


def write_adapter(folder, base, *, rows=ROWS, **lora):
    """An adapter with two more tokens, as if trained; returns logits unless `rows` is None (no resize)."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_tokens(NEW)
    lm = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        lm.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **lora)).eval()
        model.peft_config["default"].base_model_name_or_path = str(base)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.3 * torch.randn_like(weight))
            logits = None if rows is None else model(asked()).logits
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return logits


def asked():
    return torch.tensor([[5, VOCAB_SIZE, 80, VOCAB_SIZE + 1, 7, 90]])


def run_over(folder, backbone="two_stream", **model):
    network = NETWORK if backbone == "two_stream" else {}
    space = {"name": "embedding", **SPACE} if backbone == "two_stream" else {"name": "simplex"}
    return parse_run(
        {
            "model": {"base": str(folder), **model},
            "schedule": {"name": "linear"},
            "parametrization": space,
            "backbone": {"name": backbone, **network},
        }
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_an_adapter_with_tokens_of_its_own_is_merged_as_it_was_trained(tmp_path, how, tied):
    base = write_base(tmp_path / "base", tie_word_embeddings=tied)
    wanted = write_adapter(tmp_path / "adapter", base, **HOW[how])
    for run in (run_over(tmp_path / "adapter"), run_over(base, adapter=str(tmp_path / "adapter"))):
        check_run(run)
        reference = run.model
        lm = load_language_model(reference)
        with torch.no_grad():
            assert torch.allclose(lm(asked()).logits, wanted, atol=1e-5)
        assert load_tokenizer(reference).convert_tokens_to_ids(NEW) == [VOCAB_SIZE, VOCAB_SIZE + 1]
        empty = empty_language_model(load_config(reference), "sdpa")
        assert {n: w.shape for n, w in empty.state_dict().items()} == {n: w.shape for n, w in lm.state_dict().items()}


def test_an_adapter_that_keeps_no_embeddings_has_a_row_for_every_token_of_its_tokenizer(tmp_path):
    base = write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base, rows=None)
    check_run(run_over(tmp_path / "adapter"))
    assert load_language_model(ModelSection(base=str(tmp_path / "adapter"))).config.vocab_size == VOCAB_SIZE + len(NEW)


@pytest.mark.parametrize("backbone", ["two_stream", "in_place"])
def test_diffusion_over_an_adapter_with_tokens_of_its_own_is_saved_and_loaded(tmp_path, backbone):
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    write_adapter(tmp_path / "adapter", base, **HOW["modules_to_save"])
    model = build_model(run_over(tmp_path / "adapter", backbone))
    save(model, tmp_path / "out")
    found, wanted = (one.backbone.lm.state_dict() for one in (load(tmp_path / "out"), model))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(wanted["lm_head.weight"], wanted["model.embed_tokens.weight"])


def test_an_adapter_of_another_model_is_refused_in_one_line(tmp_path):
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    other = write_base(tmp_path / "other", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"^[^\n]*cannot be merged into [^\n]*other[^\n]*$"):
        load_language_model(ModelSection(base=str(other), adapter=str(tmp_path / "adapter")))


@pytest.mark.parametrize("named", [None, ""])
def test_an_adapter_without_a_base_name_says_so_and_serves_a_base_that_is_named(tmp_path, named):
    base = write_base(tmp_path / "base")
    wanted = write_adapter(tmp_path / "adapter", base)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": named}))
    for refused in (
        lambda: locate(ModelSection(base=str(tmp_path / "adapter"))),
        lambda: check_run(run_over(tmp_path / "adapter")),
    ):
        with pytest.raises(CheckpointError, match=r"names no base model.*Set model.base to .* and model.adapter"):
            refused()
    check_run(run_over(base, adapter=str(tmp_path / "adapter")))
    lm = load_language_model(ModelSection(base=str(base), adapter=str(tmp_path / "adapter")))
    with torch.no_grad():
        assert torch.allclose(lm(asked()).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("add", [lambda t: t.add_tokens(NEW), lambda t: t.add_special_tokens({"cls_token": "<tool>"})])
def test_a_tokenizer_longer_than_the_embedding_table_is_refused_before_weights_load(tmp_path, monkeypatch, add):
    base = write_base(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    count = add(tokenizer)
    tokenizer.save_pretrained(base)
    monkeypatch.setattr(
        "l2d_framework.models.checkpoint.load_language_model", lambda *_: pytest.fail("weights were loaded")
    )
    says = rf"has token '<tool>' with number {VOCAB_SIZE}, in all {VOCAB_SIZE + count} tokens.* only {VOCAB_SIZE} rows"
    data = write_sums(tmp_path / "sums.jsonl")
    training = parse_run(language_model_run(data, tmp_path / "out", model={"base": str(base)}))
    for refused in (
        lambda: check_run(run_over(base)),
        lambda: check_run(training),
        lambda: train_runs([training]),
        lambda: build_model(run_over(base)),
    ):
        with pytest.raises(ConfigError, match=says):
            refused()


def test_a_token_that_stands_for_a_picture_needs_no_row():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = tiny_lm().config
    with pytest.raises(ConfigError, match="has token '<image>'"):
        check_vocabulary(tokenizer, config, "base")
    tokenizer.image_token = "<image>"
    check_vocabulary(tokenizer, config, "base")


def test_a_table_longer_than_the_tokenizer_is_served(tmp_path):
    check_run(run_over(write_base(Path(tmp_path) / "base", vocab_size=VOCAB_SIZE + 60)))


def test_diffusion_sees_the_tokens_of_an_adapter(tmp_path):
    base = write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base, **HOW["trainable_token_indices"])
    model = build_model(run_over(tmp_path / "adapter"))
    assert model.backbone.vocab_size == ROWS
    with torch.no_grad():
        logits = model(ask_everywhere(model, all_known(random_tokens(2, 7)))).logits
    assert logits.shape[-1] == ROWS
