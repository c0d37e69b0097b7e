"""Conversations become the rows on which the authors of TESS 2 train, token by token."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from l2d_framework.config import DataSection
from l2d_framework.generation.prompts import encode_prompts, read_template
from l2d_framework.training.data.chat import ChatEncoder
from l2d_framework.training.data.collate import Collator
from l2d_framework.training.data.prepare import prepare

CONVERSATION = [
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "Yo! "},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "\nOk"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = {"single": "first", "pair": "pairs", "multiturn": "accumulated", "sliding": "sliding"}


@pytest.fixture(scope="module")
def golden(golden_file):
    return json.loads(golden_file("tess/text_formats.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(golden):
    """The byte-level toy tokenizer that the golden README describes."""
    vocabulary = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "[PAD]"]
    assert len(vocabulary) == golden["len"]
    assert vocabulary[golden["pad_id"]] == "[PAD]"
    model = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="[PAD]"
    )


@pytest.mark.parametrize("opening", [[], [SYSTEM]], ids=["plain", "system"])
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("name", TURNS)
def test_rows_labels_and_masks_are_those_of_the_reference(golden, tokenizer, tmp_path, name, opening, streaming):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [*opening, *CONVERSATION]}))
    expected = golden[name]
    length = len(expected[0]["input_ids"])
    section = DataSection.model_validate(
        {
            "train": [{"path": str(path)}],
            "chat_template": "tulu",
            "turns": TURNS[name],
            "max_length": length,
            "padding": "target",
            "streaming": streaming,
        }
    )
    found = sorted(prepare(section, tokenizer).train, key=lambda row: row["index"])
    batch = Collator(tokenizer.pad_token_id, None, padding=section.padding, max_length=section.max_length)(found)
    assert batch["input_ids"].tolist() == [row["input_ids"] for row in expected]
    assert batch["labels"].tolist() == [row["labels"] for row in expected]
    assert batch["blocks"].tolist() == golden[f"{name}_span_mask"]
    for ids, row in zip(batch["input_ids"], expected, strict=True):
        assert tokenizer.decode(ids) == row["text"]
        assert tokenizer.decode(ids[row["n_context"] :]) == row["target"]


def test_pads_as_context_are_masked_like_targets_but_not_labelled(golden, tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CONVERSATION}))
    (expected,) = golden["single"]
    section = DataSection.model_validate({"train": [{"path": str(path)}], "chat_template": "tulu", "turns": "first"})
    rows = list(prepare(section, tokenizer).train)
    pad = tokenizer.pad_token_id
    batch = Collator(pad, None, padding="context", max_length=len(expected["input_ids"]))(rows)
    assert batch["input_ids"].tolist() == [expected["input_ids"]]
    assert batch["blocks"].tolist() == golden["single_span_mask"]
    labels = torch.tensor([expected["labels"]])
    assert torch.equal(batch["labels"], labels.masked_fill(labels == pad, -100))


def test_prompts_and_whole_conversations_are_written_as_the_reference_does(golden, tokenizer):
    encoder = ChatEncoder.of(tokenizer, read_template("tulu"))
    for opening in ([], [SYSTEM]):
        prompt = [*opening, CONVERSATION[0]]
        assert encoder.render(prompt) == golden["v1_string_genprompt_False"]
        assert encoder.render(prompt, add_generation_prompt=True) == golden["v1_string_genprompt_True"]
        assert encoder.render([*prompt, CONVERSATION[1]]) == golden["v1_full"]
        (ids,) = encode_prompts(tokenizer, [prompt], read_template("tulu"))
        assert tokenizer.decode(ids) == golden["v1_string_genprompt_True"]
        assert ids == golden["single"][0]["input_ids"][: golden["single"][0]["n_context"]]
