import json

import pytest
from transformers import AutoTokenizer

from l2d_framework.config import DataSection, ScratchSection
from l2d_framework.errors import ConfigError
from l2d_framework.training.data.chat import ChatEncoder
from l2d_framework.training.language_model import scratch_config, scratch_tokenizer
from l2d_framework.training.tokenizer import train_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log"] * 5


def test_training_twice_gives_the_same_tokenizer():
    first, second = (train_tokenizer(iter(TEXTS), 280) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


@pytest.mark.parametrize("text", ["the cat", " leading and trailing ", "naïve 猫 🙂\n\t\x00", ""])
def test_any_text_survives_the_round_trip(text):
    tokenizer = train_tokenizer(TEXTS, 280)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_merges_shorten_what_was_trained_on():
    tokenizer = train_tokenizer(TEXTS, 280)
    assert len(tokenizer) <= 280
    assert len(tokenizer("the cat sat")["input_ids"]) < len("the cat sat")


def test_special_tokens_are_single_and_end_answers():
    tokenizer = train_tokenizer(TEXTS, 280)
    for token in ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    ids, supervised = ChatEncoder.of(tokenizer, tokenizer.chat_template).encode(chat)
    assert tokenizer.decode(ids) == "<|user|>the cat<|assistant|>sat<|endoftext|>"
    assert tokenizer.decode([i for i, s in zip(ids, supervised, strict=True) if s]) == "sat<|endoftext|>"


def test_saved_tokenizer_loads_as_itself(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 280)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    text = "<|user|>the cat naïve<|endoftext|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(" the  cat ,")["input_ids"]) == " the  cat ,"


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"at least 260.*got 259"):
        train_tokenizer(TEXTS, 259)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi3"])
def test_beside_the_config_of_any_family_it_is_read_as_it_was_trained(family, tmp_path):
    rows = [{"text": f"the cat sat on {n * n} mats,  and the café on 12345"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataSection.model_validate({"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 32})
    scratch = ScratchSection.model_validate({"tokenizer": {"vocab_size": 320}, "config": {"model_type": family}})
    made = scratch_tokenizer(data, scratch)
    made.save_pretrained(tmp_path / "made")
    scratch_config(scratch, made).save_pretrained(tmp_path / "made")
    read = AutoTokenizer.from_pretrained(tmp_path / "made")
    for text in (*(row["text"] for row in rows), "<|user|>7 + 89 = 96\n<|endoftext|>", "cafe\u0301"):
        assert read(text)["input_ids"] == made(text)["input_ids"]
    assert (read.eos_token_id, read.pad_token_id, len(read)) == (made.eos_token_id, made.pad_token_id, len(made))
    assert read.chat_template == made.chat_template
