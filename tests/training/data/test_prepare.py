import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from l2d_framework.config import DataSection
from l2d_framework.errors import DataError
from l2d_framework.training.data.encode import Columns, Encoding, encode_example
from l2d_framework.training.data.prepare import prepare
from l2d_framework.training.tokenizer import train_tokenizer

TEXTS = [{"text": f"{'long ' * i}document number {i}"} for i in range(40)]
PAIRS = [
    {"prompt": f"{i} plus {i}?", "completion": f" {i + i}", "topic": "math" if i % 2 else "chat"} for i in range(40)
]
CHATS = [
    {
        "id": str(i),
        "messages": [
            {"role": "user", "content": f"Say {i}."},
            {"role": "assistant", "content": str(i)},
            {"role": "user", "content": f"Say {i} twice."},
            {"role": "assistant", "content": f"{i} {i}"},
        ],
    }
    for i in range(20)
]
EVERYTHING_MARKED = "{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}"
BLANKS = [{"text": "good"}, {"text": " \n"}, {"text": "fine"}]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row["text"] for row in TEXTS], 280)


@pytest.fixture(scope="module")
def bos_tokenizer(tmp_path_factory):
    """A tokenizer that opens every sequence with a token of its own, as those of Llama do."""
    from tokenizers import processors

    made = train_tokenizer([row["text"] for row in TEXTS], 280)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": name}


def section(*sources, **options):
    return DataSection.model_validate({"train": list(sources), "max_length": 512, **options})


def decoded(tokenizer, row):
    """Whole text and supervised text of a prepared row."""
    ids = row["input_ids"]
    chosen = [i for i, flag in zip(ids, row["supervised"], strict=True) if flag]
    return tokenizer.decode(ids), tokenizer.decode(chosen)


def texts(tokenizer, data):
    return [decoded(tokenizer, row)[0] for row in data]


def test_completions_and_their_end_are_supervised(tokenizer):
    data = prepare(section(write("a.jsonl", PAIRS)), tokenizer)
    for row, pair in zip(data.train, PAIRS, strict=True):
        answer = pair["completion"] + tokenizer.eos_token
        assert decoded(tokenizer, row) == (pair["prompt"] + answer, answer)
        prompt = tokenizer(pair["prompt"])["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt


def test_every_answer_of_a_conversation_is_supervised(tokenizer):
    data = prepare(section(write("a.jsonl", CHATS)), tokenizer)
    eos = tokenizer.eos_token
    for i, row in enumerate(data.train):
        assert decoded(tokenizer, row) == (
            f"<|user|>Say {i}.<|assistant|>{i}{eos}<|user|>Say {i} twice.<|assistant|>{i} {i}{eos}",
            f"{i}{eos}{i} {i}{eos}",
        )


def test_prompts_and_completions_can_be_made_a_chat(tokenizer):
    data = prepare(
        section(
            {
                **write("a.jsonl", PAIRS),
                "format": "messages",
                "columns": {"prompt": "prompt", "completion": "completion"},
            }
        ),
        tokenizer,
    )
    assert decoded(tokenizer, data.train[3])[0] == "<|user|>3 plus 3?<|assistant|> 6<|endoftext|>"


def test_all_of_a_text_but_its_first_token_is_supervised(tokenizer, bos_tokenizer):
    for which in (tokenizer, bos_tokenizer):
        data = prepare(section(write("a.jsonl", TEXTS)), which)
        for row, source in zip(data.train, TEXTS, strict=True):
            assert decoded(which, row)[0] == (which.bos_token or "") + source["text"] + which.eos_token
            assert row["supervised"] == [False] + [True] * (len(row["input_ids"]) - 1)


def test_a_tokenizers_own_first_token_opens_prompts_once(bos_tokenizer):
    with_bos = {"prompt": "<s>already", "completion": "there"}
    data = prepare(section(write("a.jsonl", [*PAIRS[:1], with_bos])), bos_tokenizer)
    assert texts(bos_tokenizer, data.train) == ["<s>0 plus 0? 0<|endoftext|>", "<s>alreadythere<|endoftext|>"]


@pytest.mark.parametrize("rows", [PAIRS, CHATS, TEXTS], ids=["pairs", "chats", "texts"])
def test_no_first_token_is_ever_supervised(tokenizer, rows):
    source = write("a.jsonl", rows)
    for supervise in ("response", "all"):
        data = prepare(section(source, supervise=supervise), tokenizer)
        assert not any(row["supervised"][0] for row in data.train)


@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["pairs", "chats"])
def test_supervising_everything_must_be_asked_for(tokenizer, rows):
    data = prepare(section(write("a.jsonl", rows), supervise="all"), tokenizer)
    assert all(all(row["supervised"][1:]) for row in data.train)


def test_a_chat_in_which_everything_is_supervised_is_refused(tokenizer):
    source = write("a.jsonl", CHATS)
    with pytest.raises(DataError, match=r"Example 0 of 'a.jsonl'.*prompt was not recognised.*supervise: all"):
        prepare(section(source, chat_template=EVERYTHING_MARKED), tokenizer)
    assert len(prepare(section(source, chat_template=EVERYTHING_MARKED, supervise="all"), tokenizer).train) == len(
        CHATS
    )


def test_long_examples_are_cut_on_the_right(tokenizer):
    whole = prepare(section(write("a.jsonl", TEXTS)), tokenizer).train
    cut = prepare(section(write("a.jsonl", TEXTS), max_length=9), tokenizer).train
    assert [row["input_ids"] for row in cut] == [row["input_ids"][:9] for row in whole]
    assert [row["supervised"] for row in cut] == [row["supervised"][:9] for row in whole]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_an_example_with_nothing_to_learn_is_refused_by_number_or_dropped(tokenizer, streaming):
    long = {"prompt": "a very long question " * 9, "completion": "yes"}
    source = write("a.jsonl", [PAIRS[0], PAIRS[1], long, PAIRS[2]])
    with pytest.raises(DataError, match=r"Example 2 of 'a.jsonl'.*max_length = 40.*Raise.*drop_unsupervised"):
        list(prepare(section(source, max_length=40, streaming=streaming, drop_unsupervised=False), tokenizer).train)
    data = prepare(section(source, max_length=40, streaming=streaming, drop_unsupervised=True), tokenizer)
    assert len(list(data.train)) == 3
    assert sorted(row["index"] for row in data.train) == [0, 1, 2]
    assert data.card["sources"]["train"][0]["dropped"] == (None if streaming else 1)


@pytest.mark.parametrize(
    "rows",
    [
        BLANKS,
        [PAIRS[0], {**PAIRS[1], "completion": ""}, PAIRS[2]],
        [CHATS[0], {"id": "", "messages": CHATS[1]["messages"][:1]}, CHATS[2]],
    ],
    ids=["texts", "pairs", "chats"],
)
def test_an_example_without_content_is_refused_by_number_or_dropped(tokenizer, rows):
    source = write("a.jsonl", rows)
    with pytest.raises(DataError, match=r"Example 1 of 'a.jsonl'.*no token to learn from.*drop_unsupervised"):
        prepare(section(source), tokenizer)
    assert len(prepare(section(source, drop_unsupervised=True), tokenizer).train) == 2


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_dropping_everything_is_refused(tokenizer, streaming):
    source = write("a.jsonl", BLANKS[1:2])
    with pytest.raises(DataError, match=r"No example of 'a.jsonl'"):
        prepare(section(source, drop_unsupervised=True, streaming=streaming), tokenizer)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"text": "a"}, {"text": None}], {}, "Example 1 of 'a.jsonl'.*'text' holds None, not a text"),
        ([{"text": 3}], {}, "Example 0 of 'a.jsonl'.*'text' holds 3, not a text"),
        ([{"messages": "hello"}], {}, "'messages': 'hello' is not a conversation"),
        ([{"messages": [{"from": "a", "value": "b"}]}], {}, "not a conversation.*`role` and `content`"),
        (CHATS, {"chat_template": "missing.jinja"}, "'missing.jinja', which does not exist"),
        (PAIRS, {"class_map": {"chat": "general"}}, r"class_map leads to \['general'\]"),
        (PAIRS, {"pack": True}, "data.pack joins documents of plain text"),
        (TEXTS, {"streaming": True, "eval_fraction": 0.5}, "eval_fraction = 0.5 would read the whole stream"),
        (TEXTS, {"eval_fraction": 1e-9}, "No row is left for eval"),
    ],
)
def test_bad_rows_and_options_are_refused_in_words(tokenizer, rows, options, words):
    with pytest.raises(DataError, match=words):
        prepare(section(write("a.jsonl", rows), **options), tokenizer)


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer):
    endless = train_tokenizer(["x"], 280)
    endless.eos_token = None
    for rows in (TEXTS, PAIRS):
        with pytest.raises(DataError, match="no end-of-text token"):
            prepare(section(write("a.jsonl", rows)), endless)


def test_labels_become_class_numbers(tokenizer):
    source = {**write("a.jsonl", PAIRS), "class_column": "topic"}
    data = prepare(section(source, class_map={"chat": "general"}), tokenizer, classes=["code", "general", "math"])
    assert data.train["class_id"] == [2 if i % 2 else 1 for i in range(len(PAIRS))]
    assert set(prepare(section(write("a.jsonl", PAIRS)), tokenizer, classes=["math"]).train["class_id"]) == {-1}


def test_numbered_labels_are_known_by_their_names(tokenizer):
    labels = datasets.Features({"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["b", "a"])})
    datasets.Dataset.from_dict({"text": ["x y", "y z", "z x"], "kind": [1, 0, None]}, features=labels).to_parquet(
        "a.parquet"
    )
    data = prepare(section({"path": "a.parquet", "class_column": "kind"}), tokenizer, classes=["a", "b"])
    assert data.train["class_id"] == [0, 1, -1]


def test_unknown_labels_are_refused_with_the_known_ones(tokenizer):
    source = {**write("a.jsonl", PAIRS), "class_column": "topic"}
    with pytest.raises(DataError, match=r"Example 0 .*'chat' of column 'topic'.*\['math', 'code'\].*\['talk'\]"):
        prepare(section(source, class_map={"talk": "code"}), tokenizer, classes=["math", "code"])
    with pytest.raises(DataError, match=r"class column 'topic', but the run has no classes"):
        prepare(section(source), tokenizer)


@pytest.mark.parametrize(
    "options",
    [{}, {"pack": True, "max_length": 32}, {"drop_unsupervised": True, "max_length": 8}],
    ids=["plain", "packed", "dropped"],
)
def test_a_stream_holds_the_rows_and_numbers_of_the_map_in_another_order(tokenizer, options):
    source = write("a.jsonl", TEXTS)
    rows = list(prepare(section(source, **options), tokenizer).train)
    stream = prepare(section(source, streaming=True, shuffle_buffer=10, **options), tokenizer, seed=1).train
    streamed = list(stream)
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert streamed != rows
    assert sorted(streamed, key=lambda row: row["index"]) == rows
    assert list(stream) == streamed
    again = list(stream.epoch(1))
    assert again != streamed
    assert sorted(again, key=lambda row: row["index"]) == rows


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_equal_weights_give_every_row_of_every_source_once(tokenizer, streaming):
    sources = [write("a.jsonl", TEXTS[:10]), write("b.jsonl", PAIRS[:3]), write("c.jsonl", CHATS[:5])]
    data = prepare(section(*sources, streaming=streaming), tokenizer).train
    found = Counter(texts(tokenizer, data))
    alone = Counter(text for one in sources for text in texts(tokenizer, prepare(section(one), tokenizer).train))
    assert found == alone
    assert sorted(row["index"] for row in data) == list(range(18))


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_weights_are_shares_of_the_mixture_and_no_row_is_lost(tokenizer, streaming):
    big = [{"text": f"big {i}"} for i in range(300)]
    small = [{"text": f"small {i}"} for i in range(30)]
    sources = [{**write("a.jsonl", big), "weight": 3.0}, {**write("b.jsonl", small), "weight": 1.0}]
    options = {"streaming": streaming, "shuffle_buffer": 1}
    found = texts(tokenizer, prepare(section(*sources, **options), tokenizer, seed=3).train)
    share = sum(text.startswith("big") for text in found) / len(found)
    # Five standard errors of a proportion over some 400 draws.
    assert share == pytest.approx(0.75, abs=0.11)
    assert len(set(found)) == 330
    assert found == texts(tokenizer, prepare(section(*sources, **options), tokenizer, seed=3).train)
    assert found != texts(tokenizer, prepare(section(*sources, **options), tokenizer, seed=4).train)


def test_the_order_seed_decides_the_mixture_but_not_the_held_out_rows(tokenizer):
    sources = [{**write("a.jsonl", TEXTS), "weight": 2.0}, write("b.jsonl", PAIRS)]
    runs = [
        prepare(section(*sources, eval_fraction=0.3, shuffle_seed=shuffle), tokenizer, seed=seed)
        for shuffle, seed in [(1, 0), (2, 0), (1, 5)]
    ]
    held = [set(texts(tokenizer, run.eval)) for run in runs]
    assert held[0] == held[1] != held[2]
    assert texts(tokenizer, runs[0].train) != texts(tokenizer, runs[1].train)


def test_held_out_rows_are_apart_deterministic_and_by_content(tokenizer):
    rows = [{"text": f"row {i // 2}"} for i in range(400)]
    data = prepare(section(write("a.jsonl", rows), eval_fraction=0.25), tokenizer, seed=1)
    train, held = (set(texts(tokenizer, part)) for part in (data.train, data.eval))
    assert not train & held
    assert len(train) + len(held) == 200
    assert len(data.train) + len(data.eval) == 400
    # Five standard errors of a proportion of 200 different rows.
    assert len(held) / 200 == pytest.approx(0.25, abs=0.16)
    more = [{"text": "one more"}, *reversed(rows)]
    again = prepare(section(write("b.jsonl", more), eval_fraction=0.25), tokenizer, seed=1)
    assert set(texts(tokenizer, again.eval)) - {"one more<|endoftext|>"} == held
    other = prepare(section({"path": "a.jsonl"}, eval_fraction=0.25), tokenizer, seed=2)
    assert set(texts(tokenizer, other.eval)) != held
    assert list(data.eval["index"]) == list(range(len(data.eval)))


def test_evaluation_sources_are_read_once_whatever_their_weights(tokenizer):
    evaluation = [{**write("b.jsonl", PAIRS[:5]), "weight": 9.0}, write("c.jsonl", PAIRS[5:9])]
    data = prepare(section(write("a.jsonl", TEXTS), eval=evaluation), tokenizer)
    assert texts(tokenizer, data.eval) == [f"{p['prompt']}{p['completion']}<|endoftext|>" for p in PAIRS[:9]]
    assert prepare(section({"path": "a.jsonl"}), tokenizer).eval is None


def test_packing_fills_chunks_and_loses_no_token(tokenizer):
    source = write("a.jsonl", TEXTS)
    loose = prepare(section(source), tokenizer).train
    packed = prepare(section(source, pack=True, max_length=32), tokenizer).train
    lengths = [len(row["input_ids"]) for row in packed]
    assert set(lengths[:-1]) == {32}
    assert 1 < lengths[-1] <= 32
    stream = [i for row in packed for i in row["input_ids"]]
    expected = [i for row in loose for i in row["input_ids"]]
    assert stream == expected[: len(stream)]
    assert len(expected) - len(stream) <= 1
    assert not any(row["supervised"][0] for row in packed)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_packing_leaves_no_short_row_in_the_middle_of_a_corpus(tokenizer, streaming):
    sources = [write("a.jsonl", [{"text": f"a {i}"} for i in range(1500)]), write("b.jsonl", TEXTS)]
    data = prepare(section(*sources, pack=True, max_length=64, streaming=streaming), tokenizer).train
    lengths = [len(row["input_ids"]) for row in sorted(data, key=lambda row: row["index"])]
    assert len(lengths) > 100
    assert set(lengths[:-1]) == {64}


def test_packing_again_reads_the_cache_and_other_lengths_do_not(tokenizer):
    def pack(length):
        return prepare(section({"path": "a.jsonl"}, pack=True, max_length=length), tokenizer).train

    write("a.jsonl", TEXTS)
    first = pack(32)
    written = Path(first.cache_files[0]["filename"])
    before = written.stat().st_mtime_ns
    again = pack(32)
    assert again["input_ids"] == first["input_ids"]
    assert again.cache_files[0]["filename"] == str(written)
    assert written.stat().st_mtime_ns == before
    assert pack(16)["input_ids"] != first["input_ids"]


def test_nothing_left_to_hold_out_of_a_packed_corpus_is_said(tokenizer):
    with pytest.raises(DataError, match="No row is left for eval"):
        prepare(section(write("a.jsonl", TEXTS[:2]), pack=True, eval_fraction=1e-9), tokenizer)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_one_conversation_may_give_several_rows_with_one_answer_each(tokenizer, streaming):
    options = {"streaming": streaming, "shuffle_buffer": 1}
    rows = {
        turns: [
            decoded(tokenizer, row)
            for row in prepare(section(write("c.jsonl", CHATS), turns=turns, **options), tokenizer).train
        ]
        for turns in ("all", "first", "pairs", "accumulated", "sliding")
    }
    assert [len(found) for found in rows.values()] == [20, 20, 40, 40, 60]
    whole, last = rows["all"][3][0], "3 3<|endoftext|>"
    first = next(found for found in rows["first"] if found[1] == "3<|endoftext|>")
    assert (whole, last) in rows["accumulated"] and first in rows["accumulated"]
    assert first in rows["pairs"] and whole.startswith(first[0])
    assert (whole.removeprefix(first[0]), last) in rows["pairs"]
    assert Counter(rows["sliding"]) == Counter(set(rows["pairs"]) | set(rows["accumulated"]))


def test_dropping_most_of_the_data_is_not_silent(tokenizer, caplog):
    long = {"prompt": "a very long question " * 9, "completion": "yes"}
    for count in (0, 1, 2):
        caplog.clear()
        rows = [*PAIRS[: 3 - count], *[long] * count]
        prepare(section(write("a.jsonl", rows), max_length=40, drop_unsupervised=True), tokenizer)
        assert (f"left out {count} of 3 examples" in caplog.text) is (count > 0)


MARKED = [{"text": text} for text in ("one", "a\u2028b\u2029c\u0085d", "two")]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("ending", ["jsonl", "txt", "txt.gz", "jsonl.gz"])
@pytest.mark.parametrize("named", ["set/*", "set", "set/0.{ending}"], ids=["pattern", "folder", "file"])
def test_a_byte_order_mark_is_never_trained_on_and_stops_no_stream(tokenizer, named, ending, streaming):
    Path("set").mkdir()
    for number in range(2):
        lines = [row["text"] if "txt" in ending else json.dumps(row, ensure_ascii=False) for row in MARKED]
        content = "\ufeff" + "".join(f"{line}\n" for line in lines)
        packed = gzip.compress(content.encode()) if ending.endswith("gz") else content.encode()
        Path(f"set/{number}.{ending}").write_bytes(packed)
    rows = prepare(section({"path": named.format(ending=ending)}, streaming=streaming), tokenizer).train
    found = sorted(tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows)
    assert found == sorted([row["text"] for row in MARKED] * (1 if "0" in named else 2))


LONG = {"prompt": "a very long question " * 9, "completion": "yes"}


@pytest.mark.parametrize("turns", ["all", "pairs"])
@pytest.mark.parametrize(
    ("share", "count"), [({}, 2), ({"drop_unsupervised": 0.5}, 20), ({"drop_unsupervised": True}, 39)]
)
def test_examples_without_a_supervised_token_are_left_out_and_counted_up_to_a_share(tokenizer, share, count, turns):
    rows = [[*PAIRS[: 40 - n], *[LONG] * n] for n in (count, count + 1)]
    good, bad = (section(write(f"{n}.jsonl", row), max_length=40, turns=turns, **share) for n, row in enumerate(rows))
    data = prepare(good, tokenizer)
    assert len(data.train) == 40 - count
    assert data.card["sources"]["train"][0]["dropped"] == count
    assert data.card["splits"]["train"]["examples"] == 40 - count
    with pytest.raises(DataError, match=rf"Example {39 - count} of '1.jsonl'.*one of {count + 1} in 40|No example of"):
        prepare(bad, tokenizer)


def test_a_stream_stops_at_the_same_share_once_it_has_seen_enough(tokenizer, caplog):
    rows = [LONG if i % 20 == 19 else PAIRS[i % 40] for i in range(400)]
    data = prepare(section(write("a.jsonl", rows), max_length=40, streaming=True), tokenizer).train
    assert len(list(data)) == 380
    rows[250:262] = [LONG] * 12
    data = prepare(section(write("b.jsonl", rows), max_length=40, streaming=True), tokenizer).train
    with pytest.raises(DataError, match=r"Example \d+ of 'b.jsonl'.*allows a share of 0.05"):
        list(data)
    assert "left out 1 of 20 examples" in caplog.text


def test_a_share_is_no_percentage():
    with pytest.raises(ValueError, match="less than or equal to 1"):
        section("a.jsonl", drop_unsupervised=5.0)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, r"column 'messages': \[\] is not a conversation"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 0 of role 'user' has the content None"),
        ({"messages": [{"role": "system", "content": "a"}, *CHATS[0]["messages"]]}, "no system"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "turn 0, a list of parts"),
    ],
    ids=["empty", "null", "system", "parts"],
)
def test_a_conversation_that_cannot_be_rendered_is_named_by_row_and_turn(tokenizer, row, words, streaming):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|user|>{{ m.content }}<|assistant|>{% endfor %}"
    )
    if not streaming and isinstance((row["messages"] or [{"content": ""}])[0]["content"], list):
        pytest.skip("a table has no column of both texts and lists")
    source = write("a.jsonl", [{"messages": CHATS[i]["messages"]} for i in range(3)] + [row])
    with pytest.raises(DataError, match=f"Example 3 of 'a.jsonl'.*{words}"):
        list(prepare(section(source, streaming=streaming, chat_template=template), tokenizer).train)


@pytest.mark.parametrize("field", ["text", "prompt", "completion", "messages"])
def test_half_a_character_is_named_by_row(tokenizer, field):
    half = "a\ud800"
    rows = {
        "text": [*TEXTS[:3], {"text": half}],
        "prompt": [*PAIRS[:3], {"prompt": half, "completion": "a"}],
        "completion": [*PAIRS[:3], {"prompt": "a", "completion": half}],
        "messages": [*CHATS[:3], {"messages": [{"role": "user", "content": half}, CHATS[0]["messages"][1]]}],
    }
    source = write("a.jsonl", rows[field])
    with pytest.raises(DataError, match=r"Example 3 of 'a.jsonl'.*half of a character"):
        list(prepare(section(source, streaming=True), tokenizer).train)


def test_rows_of_a_conversation_beyond_the_length_are_dropped_alone(tokenizer):
    source = write("c.jsonl", [{"messages": [*CHATS[0]["messages"], *CHATS[1]["messages"]]}])
    options = {"turns": "accumulated", "max_length": 40}
    assert len(prepare(section(source, **options, drop_unsupervised=True), tokenizer).train) in (2, 3)
    with pytest.raises(DataError, match=r"Example 0 of .* beyond max_length = 40"):
        prepare(section(source, **options), tokenizer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"turns": "pairs", "supervise": "all"}, "turns 'pairs' supervises one answer"),
        ({"masking": {}, "supervise": "all"}, "masking decides what is supervised"),
        ({"masking": {"objectives": []}}, "at least 1 item"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        section({"path": "a.jsonl"}, **options)


def test_masked_tokens_are_not_counted_before_they_are_drawn(tokenizer):
    data = prepare(section(write("a.jsonl", TEXTS), masking={}), tokenizer)
    assert data.card["splits"]["train"]["supervised_tokens"] is None
    assert data.card["splits"]["train"]["tokens"] > 0


def test_sizes_on_the_card_are_those_of_the_rows(tokenizer):
    sources = [{**write("a.jsonl", TEXTS), "weight": 2.0}, {**write("b.jsonl", CHATS), "weight": 1.0, "limit": 7}]
    data = prepare(section(*sources, eval=[write("c.jsonl", PAIRS)], eval_fraction=0.0), tokenizer)
    assert json.loads(json.dumps(data.card)) == data.card
    for split, rows in (("train", data.train), ("eval", data.eval)):
        assert data.card["splits"][split] == {
            "examples": len(rows),
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "supervised_tokens": sum(sum(row["supervised"]) for row in rows),
        }
    assert [one["rows"] for one in data.card["sources"]["train"]] == [40, 7]
    assert [one["dropped"] for one in data.card["sources"]["train"]] == [0, 0]


def test_preparing_again_reads_the_cache_and_other_settings_do_not(tokenizer, monkeypatch):
    source = write("a.jsonl", PAIRS)
    first = prepare(section(source), tokenizer).train
    other = train_tokenizer(["unlike the first"], 270)
    assert prepare(section(source), other).train["input_ids"] != first["input_ids"]
    assert prepare(section(source, supervise="all"), tokenizer).train["supervised"] != first["supervised"]
    monkeypatch.setattr("l2d_framework.training.data.prepare.encode_example", None)
    again = prepare(section(source), tokenizer).train
    assert again["input_ids"] == first["input_ids"]


def test_nothing_is_written_beside_the_data(tokenizer, here):
    source = write("a.jsonl", TEXTS)
    prepare(section(source, write("b.jsonl", PAIRS), eval_fraction=0.3), tokenizer)
    assert sorted(path.name for path in here.rglob("*")) == ["a.jsonl", "b.jsonl"]


def test_a_row_is_encoded_alone_as_in_a_data_set(tokenizer):
    data = prepare(section(write("a.jsonl", PAIRS)), tokenizer)
    encoding = Encoding.of(section({"path": "a.jsonl"}), tokenizer, classes=[], has_chat=False)
    columns = Columns("prompt_completion", {"prompt": "prompt", "completion": "completion"})
    for row, source in zip(data.train, PAIRS, strict=True):
        assert {**encode_example(source, columns, encoding), "index": row["index"]} == row


def test_the_offline_gsm8k_is_prepared(datasets_dir, tokenizer, monkeypatch):
    monkeypatch.chdir(datasets_dir)
    source = {"path": "openai/gsm8k", "name": "main", "columns": {"prompt": "question", "completion": "answer"}}
    data = prepare(
        section({**source, "limit": 200}, eval=[{**source, "split": "test", "limit": 50}], max_length=2048), tokenizer
    )
    assert (len(data.train), len(data.eval)) == (200, 50)
    first = datasets.load_dataset("openai/gsm8k", "main", split="train")[0]
    whole, answer = decoded(tokenizer, data.train[0])
    assert answer == first["answer"] + tokenizer.eos_token
    assert whole == first["question"] + answer
    assert data.card["sources"]["train"][0]["local"]
