"""The suite's own tools: reference folders are never skipped by mistake, tiny models are what tests take them for."""

from pathlib import Path

import pytest
import shared_folders
import torch
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_variable_that_points_nowhere_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("L2D_GOLDEN_DIR", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="L2D_GOLDEN_DIR"):
        shared_folders.find("L2D_GOLDEN_DIR", "golden")


def test_variable_wins_over_the_folder_beside_the_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_folders, "REPOSITORY", tmp_path / "repository")
    monkeypatch.delenv("L2D_GOLDEN_DIR", raising=False)
    assert shared_folders.find("L2D_GOLDEN_DIR", "golden") is None
    beside = tmp_path / "shared" / "golden"
    beside.mkdir(parents=True)
    assert shared_folders.find("L2D_GOLDEN_DIR", "golden") == beside
    monkeypatch.setenv("L2D_GOLDEN_DIR", str(tmp_path))
    assert shared_folders.find("L2D_GOLDEN_DIR", "golden") == tmp_path.resolve()


def test_without_another_folder_the_small_one_of_the_repository_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_folders, "REPOSITORY", tmp_path / "repository")
    for name in ("L2D_GOLDEN_DIR", "L2D_DATASETS_DIR"):
        monkeypatch.delenv(name, raising=False)
    small = tmp_path / "repository" / "tests" / "golden" / "data"
    small.mkdir(parents=True)
    assert shared_folders.find("L2D_GOLDEN_DIR", "golden") == small
    assert shared_folders.find("L2D_DATASETS_DIR", "datasets") is None
    (tmp_path / "shared" / "golden").mkdir(parents=True)
    assert shared_folders.find("L2D_GOLDEN_DIR", "golden") == tmp_path / "shared" / "golden"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_of_the_prefix_is_felt(tiny_lm, family):
    model = tiny_lm(family)
    tokens = torch.arange(5, 11)[None]
    with torch.no_grad():
        before = model(tokens).logits[0, -1]
        for position in range(tokens.shape[1]):
            changed = tokens.clone()
            changed[0, position] = 200
            assert (model(changed).logits[0, -1] - before).abs().max() > 1e-3


def test_same_seed_same_model(tiny_lm):
    first, again, other = tiny_lm(), tiny_lm(), tiny_lm(seed=1)
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_any_text_round_trips(tiny_tokenizer):
    text = "3 + 4 = 7,  déjà vu\n☃"
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.padding_side == "left"


def test_saved_folder_loads_with_the_auto_classes(saved_tiny_lm, tiny_lm):
    folder = saved_tiny_lm(chat=True)
    assert isinstance(folder, Path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("abc", return_tensors="pt")["input_ids"]
    assert torch.equal(model(tokens).logits, tiny_lm()(tokens).logits)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|turn|>user\nhi</s>\n"
    assert tokenizer(rendered)["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|turn|>")
