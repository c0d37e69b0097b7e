import pytest
import torch
from tiny_models import ADDING, tiny_lm
from transformers import GenerationConfig, LlamaConfig

from l2d_framework.errors import ConfigError, DataError
from l2d_framework.generation.chat_template import TEMPLATE_DATE
from l2d_framework.generation.prompts import (
    check_length,
    context_length,
    encode_prompts,
    encode_text,
    pad_left,
    read_template,
)

CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "?"},
]


@pytest.mark.parametrize("adding", ADDING)
def test_a_text_gets_what_its_tokenizer_puts_in_front_and_nothing_behind(tiny_tokenizer, adding):
    tokenizer = tiny_tokenizer(adding=adding)
    front = ADDING[adding].partition("$A")[0].replace(" ", "")
    assert [tokenizer.decode(ids) for ids in encode_prompts(tokenizer, ["abc", "d"])] == [f"{front}abc", f"{front}d"]


@pytest.mark.parametrize("adding", ADDING)
def test_what_stands_in_front_is_not_doubled_where_a_text_spells_it_out(tiny_tokenizer, adding):
    tokenizer = tiny_tokenizer(adding=adding)
    ids = encode_text(tokenizer, "abc")
    assert encode_text(tokenizer, tokenizer.decode(ids)) == ids


def test_a_conversation_ends_with_the_generation_prompt(tiny_tokenizer):
    tokenizer = tiny_tokenizer(chat=True)
    (tokens,) = encode_prompts(tokenizer, [CONVERSATION])
    turns = "".join(f"<|turn|>{m['role']}\n{m['content']}</s>\n" for m in CONVERSATION)
    assert tokenizer.decode(tokens) == turns + "<|turn|>assistant\n"


@pytest.mark.parametrize("adding", ADDING)
def test_special_tokens_of_a_conversation_are_those_of_the_template_and_no_more(tiny_tokenizer, adding):
    plain, other = tiny_tokenizer(chat=True), tiny_tokenizer(chat=True, adding=adding)
    assert encode_prompts(other, [CONVERSATION]) == encode_prompts(plain, [CONVERSATION])


def test_a_given_template_replaces_the_tokenizers_own(tiny_tokenizer):
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ date_string }}"
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer(chat=True)):
        (tokens,) = encode_prompts(tokenizer, [CONVERSATION], template)
        assert tokenizer.decode(tokens) == f"[hi][yes?][?]{TEMPLATE_DATE}"


def test_a_template_may_stand_in_a_file(tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert read_template(str(tmp_path / "chat.jinja")) == "{{ messages }}"
    assert read_template("{{ messages }}") == "{{ messages }}"
    assert read_template(None) is None
    with pytest.raises(DataError, match=r"names the file 'none.jinja', which does not exist"):
        read_template("none.jinja")


def test_what_cannot_be_encoded_is_named(tiny_tokenizer):
    with pytest.raises(ConfigError, match="no tokenizer, so it takes token ids only"):
        encode_prompts(None, ["a"])
    with pytest.raises(ConfigError, match=r"Prompt 1 is a conversation, but the tokenizer .* has no chat template"):
        encode_prompts(tiny_tokenizer(), ["a", CONVERSATION])
    with pytest.raises(ConfigError, match=r"Prompt 1 is empty. Give at least one token"):
        encode_prompts(tiny_tokenizer(), ["a", ""])


def test_prompts_of_unequal_length_are_padded_on_the_left():
    found = pad_left([[5, 6, 7], [8], [9, 10]], ["a", "b", "c"])
    assert found.input_ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 10]]
    assert found.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert found.keys == ["a", "b", "c"]
    assert found.input_ids.dtype == found.attention_mask.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 9}, "Prompt 1 has 8 tokens and with its answer would reach 17, but .* context is 16"),
        ({"max_length": 17}, "would reach 17"),
        ({"max_new_tokens": 9, "max_length": 4}, "would reach 17"),
    ],
)
def test_a_prompt_whose_answer_would_not_fit_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        check_length([3, 8], GenerationConfig(**options), LlamaConfig(max_position_embeddings=16))


def test_a_prompt_that_fills_the_context_has_no_room_for_a_token():
    with pytest.raises(ConfigError, match="Prompt 0 has 16 tokens and with its answer would reach 17"):
        check_length([16], GenerationConfig(max_length=16), LlamaConfig(max_position_embeddings=16))


def test_prompts_that_fit_are_let_through():
    check_length([3, 8], GenerationConfig(max_new_tokens=8), LlamaConfig(max_position_embeddings=16))
    check_length([3, 8000], GenerationConfig(max_new_tokens=8), object())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_a_model_reads_as_many_tokens_as_its_context_says(family):
    lm = tiny_lm(family)
    limit = context_length(lm.config)
    layer = {"roberta": "position_embeddings", "bert": "position_embeddings", "gpt2": "wpe"}.get(family)
    assert limit is not None
    with torch.no_grad():
        lm(torch.full((1, limit), 7))
        if layer is not None:
            with pytest.raises((IndexError, RuntimeError)):
                lm(torch.full((1, limit + 1), 7))
