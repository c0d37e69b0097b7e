import jinja2
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from l2d_framework.errors import DataError
from l2d_framework.generation.chat_template import TEMPLATE_DATE
from l2d_framework.generation.prompts import turn_end
from l2d_framework.training.data.chat import ChatEncoder, resolve_template, split_turns
from l2d_framework.training.tokenizer import train_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% set date_string = date_string or strftime_now('%d %b %Y') %}"
    "{{ bos_token }}<|head|>system<|/head|>\n\nToday: {{ date_string }}<|eot|>"
    "{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
END_BEYOND_MARKS = MARKED_WITHOUT_END.replace("{% endgeneration %}<|im_end|>", "{% endgeneration %}\n<|im_end|>")
BLANK_BEFORE_END = (
    "{% for m in messages %}[{{ m['role'] }}]: {{ m['content'] }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]:{% endif %}"
)
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A:' }}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
ONLY_LAST_TURN_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}<think>\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And twice that?"},
    {"role": "assistant", "content": "Eight, of course."},
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([turn["content"] for turn in CONVERSATION] * 3 + ["assistant\n\n user\nsystem\n"] * 3, 300)
    made.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": SPECIAL})
    return made


@pytest.fixture(scope="module")
def metaspace():
    """A tokenizer that puts a space before the first word, as those of Llama 2 and Mistral do."""
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    texts = [turn["content"] for turn in CONVERSATION] + ["[INST] [/INST] user assistant"]
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")


def answers(tokenizer, encoded):
    """Text of each run of supervised tokens."""
    runs, before = [], False
    for token, flag in zip(*encoded, strict=True):
        if flag:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = flag
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot|>"),
        (MARKED, "<|im_end|>"),
        (MARKED_WITHOUT_END, "<|im_end|>"),
    ],
    ids=["chatml", "llama3", "marked", "marked_without_end"],
)
def test_every_answer_and_its_turn_end_are_supervised_and_nothing_else(tokenizer, template, end):
    encoded = ChatEncoder.of(tokenizer, template).encode(CONVERSATION)
    assert answers(tokenizer, encoded) == [f"It is four.{end}", f"Eight, of course.{end}"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MARKED, BARE], ids=["chatml", "llama3", "marked", "bare"])
def test_tokens_before_an_answer_are_those_generation_starts_from(tokenizer, template):
    encoder = ChatEncoder.of(tokenizer, template)
    ids, supervised = encoder.encode(CONVERSATION[:3])
    prompt = tokenizer(encoder.render(CONVERSATION[:2], add_generation_prompt=True), add_special_tokens=False)
    n = len(prompt["input_ids"])
    assert ids[:n] == prompt["input_ids"]
    assert supervised == [False] * n + [True] * (len(ids) - n)


@pytest.mark.parametrize(
    "template",
    [CHATML, LLAMA3, MARKED, MARKED_WITHOUT_END, BARE, BLANK_BEFORE_END, TWO_ENDS, END_BEYOND_MARKS, "tulu"],
    ids=["chatml", "llama3", "marked", "unended", "bare", "blank", "two", "beyond", "tulu"],
)
def test_an_answer_stops_at_the_first_of_the_ends_that_training_taught(tokenizer, template):
    encoder = ChatEncoder.of(tokenizer, resolve_template(template, tokenizer))
    ids, supervised = encoder.encode(CONVERSATION[1:3])
    answer = [i for i, flag in zip(ids, supervised, strict=True) if flag]
    ends = {turn_end(tokenizer, encoder.template), encoder.last_token()}
    stop = next(n for n, token in enumerate(answer) if token in ends)
    assert tokenizer.decode(answer[:stop]).strip() == "It is four."
    assert not encoder.special_ids.intersection(answer[:stop])


def test_a_template_that_refuses_an_exchange_ends_it_with_the_text(tokenizer):
    assert turn_end(tokenizer, "{{ raise_exception('tools first') }}") == tokenizer.eos_token_id
    assert ChatEncoder.of(tokenizer, "{{ raise_exception('tools first') }}").last_token() is None


def test_marked_and_unmarked_forms_of_a_template_agree(tokenizer):
    encode = [ChatEncoder.of(tokenizer, template).encode for template in (CHATML, MARKED, MARKED_WITHOUT_END)]
    assert encode[0](CONVERSATION) == encode[1](CONVERSATION) == encode[2](CONVERSATION)


def test_marks_agree_with_the_mask_of_transformers(tokenizer):
    ids, supervised = ChatEncoder.of(tokenizer, MARKED).encode(CONVERSATION)
    theirs = tokenizer.apply_chat_template(
        CONVERSATION, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == theirs["input_ids"][: len(ids)]
    assert supervised == [bool(flag) for flag in theirs["assistant_masks"][: len(ids)]]
    assert not any(theirs["assistant_masks"][len(ids) :])


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefix", "marked"])
def test_an_answer_that_would_merge_with_its_prompt_is_tokenized_apart(tokenizer, template):
    encoder = ChatEncoder.of(tokenizer, template)
    conversation = [CONVERSATION[1], {"role": "assistant", "content": "\n four"}]
    prompt = tokenizer(encoder.render(conversation[:1], add_generation_prompt=True), add_special_tokens=False)
    whole = tokenizer(encoder.render(conversation), add_special_tokens=False)
    n = len(prompt["input_ids"])
    assert whole["input_ids"][:n] != prompt["input_ids"], "the case must merge"
    ids, supervised = encoder.encode(conversation)
    assert ids[:n] == prompt["input_ids"]
    assert supervised == [False] * n + [True] * (len(ids) - n)
    assert tokenizer.decode(ids[n:]) == "\n four<|im_end|>"


def test_a_tokenizer_that_prepends_spaces_keeps_the_tokens_of_the_whole(metaspace):
    opening = "{{ '[INST]' if m['role'] == 'user' else '[/INST] ' }}"
    template = f"{{% for m in messages %}}{opening}{{{{ m['content'] }}}}{{% endfor %}}"
    ids, supervised = ChatEncoder.of(metaspace, template).encode(CONVERSATION[1:3])
    text = "[INST]Two plus two?[/INST] It is four."
    assert ids == [*metaspace(text)["input_ids"], metaspace.eos_token_id]
    assert metaspace.decode([i for i, flag in zip(ids, supervised, strict=True) if flag]) == "[/INST] It is four.</s>"


def test_a_border_inside_a_word_of_such_a_tokenizer_is_refused(metaspace):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torn = [{"role": "user", "content": "Two pl"}, {"role": "assistant", "content": "us two?"}]
    with pytest.raises(DataError, match="merges the end of the prompt"):
        ChatEncoder.of(metaspace, template).encode(torn)


def test_a_template_without_turn_end_gets_the_end_of_text(tokenizer):
    ids, supervised = ChatEncoder.of(tokenizer, BARE).encode(CONVERSATION[1:3])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert supervised[-1]


@pytest.mark.parametrize("template", [CHATML, MARKED, ONLY_LAST_TURN_THINKS], ids=["prefix", "marked", "rewriting"])
def test_the_last_answer_may_be_supervised_alone(tokenizer, template):
    encoder = ChatEncoder.of(tokenizer, template)
    ids, supervised = encoder.encode(CONVERSATION, last_only=True)
    assert tokenizer.decode(ids) == encoder.render(CONVERSATION).rstrip("\n")
    (answer,) = answers(tokenizer, (ids, supervised))
    assert answer.endswith("Eight, of course.<|im_end|>")


def test_stretches_of_a_conversation_keep_its_opening_and_end_in_an_answer():
    system, *turns = CONVERSATION
    pairs = [[system, *turns[:2]], [system, *turns[2:]]]
    later = [*turns, {"role": "user", "content": "Thanks."}]
    for conversation in ([system, *turns], [system, *later]):
        assert split_turns(conversation, "first") == pairs[:1]
        assert split_turns(conversation, "pairs") == pairs
        assert split_turns(conversation, "accumulated") == [pairs[0], CONVERSATION]
        assert split_turns(conversation, "sliding") == [pairs[0], CONVERSATION, pairs[1]]
        assert split_turns(conversation, "all") == [conversation]
    assert split_turns([system], "pairs") == [[system]]


def test_the_shipped_tulu_template_supervises_every_answer_and_ends_the_last(tokenizer):
    encoder = ChatEncoder.of(tokenizer, resolve_template("tulu", tokenizer))
    encoded = encoder.encode(CONVERSATION)
    assert answers(tokenizer, encoded) == ["It is four.", "Eight, of course.<|endoftext|>"]
    assert encoder.render(CONVERSATION, add_generation_prompt=True).startswith(
        "<s><|user|>\nTwo plus two?\n<|assistant|>"
    )


def test_an_unknown_template_is_refused_with_the_names_of_the_shipped_ones(tokenizer):
    with pytest.raises(DataError, match=r"'tullu', which does not exist .* or a name: .*tulu"):
        resolve_template("tullu", tokenizer)


def test_tokens_after_the_last_answer_are_left_out(tokenizer):
    encoder = ChatEncoder.of(tokenizer, CHATML)
    assert encoder.encode([*CONVERSATION, {"role": "user", "content": "Thanks."}]) == encoder.encode(CONVERSATION)


def test_a_conversation_without_answer_has_no_tokens_to_learn(tokenizer):
    assert ChatEncoder.of(tokenizer, CHATML).encode(CONVERSATION[:2]) == ([], [])
    assert ChatEncoder.of(tokenizer, MARKED).encode(CONVERSATION[:2]) == ([], [])


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    encoder = ChatEncoder.of(tokenizer, ONLY_LAST_TURN_THINKS)
    assert answers(tokenizer, encoder.encode(CONVERSATION[:3])) == ["<think>\nIt is four.<|im_end|>"]
    with pytest.raises(DataError, match=r"part at character \d+.*generation"):
        encoder.encode(CONVERSATION)


def test_a_conversation_the_template_refuses_is_reported_with_its_words(tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        ChatEncoder.of(tokenizer, template).encode(CONVERSATION)
    with pytest.raises(DataError, match="cannot render") as caught:
        ChatEncoder.of(tokenizer, "{% for %}").encode(CONVERSATION)
    assert isinstance(caught.value.__cause__, jinja2.TemplateSyntaxError)


def test_fields_that_are_none_are_absent_for_the_template(tokenizer):
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{% if 'tools' in m %}TOOLS{% endif %}")
    encoder = ChatEncoder.of(tokenizer, template)
    assert encoder.encode([{**turn, "tools": None} for turn in CONVERSATION]) == encoder.encode(CONVERSATION)


def test_a_template_that_prints_the_date_prints_the_same_one_every_day(tokenizer):
    assert TEMPLATE_DATE in ChatEncoder.of(tokenizer, LLAMA3).render(CONVERSATION)


def test_supervising_everything_keeps_the_whole_conversation(tokenizer):
    encoder = ChatEncoder.of(tokenizer, CHATML)
    ids, supervised = encoder.encode_all(CONVERSATION)
    assert tokenizer.decode(ids) == encoder.render(CONVERSATION).rstrip("\n")
    assert all(supervised)


def test_template_comes_from_text_file_or_tokenizer(tokenizer, tmp_path, tiny_tokenizer):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    assert resolve_template(str(path), tokenizer) == resolve_template(CHATML, tokenizer) == CHATML
    assert resolve_template(None, tokenizer) == tokenizer.chat_template
    with pytest.raises(DataError, match="no_such_file"):
        resolve_template("no_such_file.jinja", tokenizer)
    with pytest.raises(DataError, match="no chat template"):
        resolve_template(None, tiny_tokenizer(chat=False))
