"""One reader of lines: what ends a line, what begins a file, and what cannot be read."""

import bz2
import gzip
import json

import pytest

from l2d_bench.data.rows import read_rows
from l2d_bench.protocols.alpaca_eval import write_outputs
from l2d_framework.cli.generate_session import read_prompts
from l2d_framework.errors import DataError
from l2d_framework.evaluation.text.samples import Columns, read_golds, read_samples
from l2d_framework.lines import read_lines, read_objects, spans
from l2d_framework.training.data.sources import first_columns, json_lines

# What str.splitlines takes for the end of a line, beside the two that are one.
SEPARATORS = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"
TEXTS = ["first", f"sec{SEPARATORS}ond", "third\ufeff"]


def jsonl(*rows, mark=True, end="\n"):
    text = end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end
    return text.encode("utf-8-sig" if mark else "utf-8")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"], ids=["unix", "windows", "blank lines"])
@pytest.mark.parametrize("mark", [False, True], ids=["bare", "marked"])
@pytest.mark.parametrize("packed", [None, gzip.compress, bz2.compress], ids=["plain", "gz", "bz2"])
def test_lines_end_at_line_feeds_only_and_begin_after_the_mark(tmp_path, packed, mark, end):
    content = (end.join(TEXTS) + end).encode("utf-8-sig" if mark else "utf-8")
    suffix = {None: "", gzip.compress: ".gz", bz2.compress: ".bz2"}[packed]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(content if packed is None else packed(content))
    step = 3 if " " in end else 1
    assert list(read_lines(path)) == [(step * i + 1, text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("mark", [False, True], ids=["bare", "marked"])
def test_stretches_of_a_file_have_its_lines_once_and_in_order(tmp_path, mark, end):
    path = tmp_path / "a.txt"
    content = end.join(TEXTS).encode("utf-8-sig" if mark else "utf-8")
    path.write_bytes(content)
    for size in range(1, len(content) + 1):
        parts = spans(path, size)
        assert len(parts) == -(-len(content) // size)
        assert [text for part in parts for _, text in read_lines(path, part)] == TEXTS
    assert spans(tmp_path / "b.txt.gz", 1) == spans(tmp_path / "none.txt", 1) == [None]


READERS = {
    "objects": lambda path: [row["text"] for _, row in read_objects(path)],
    "training": lambda path: [row["text"] for row in json_lines([(path, None), (path, None)], ("text",))][: len(TEXTS)],
    "prompts": lambda path: list(read_prompts([], path, chat=False).values()),
    "samples": lambda path: [sample.text for sample in read_samples(path, Columns(prefix="none"))],
    "golds": lambda path: read_golds(path, "text"),
    "benchmark": lambda path: [row["text"] for row in read_rows(str(path), ("text",), None)],
}


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("mark", [False, True], ids=["bare", "marked"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_of_json_lines_sees_the_same_texts(tmp_path, read, mark, end):
    path = tmp_path / "a.jsonl"
    rows = [{"text": text, "prompt": text, "none": "", "answers": [{"text": text}]} for text in TEXTS]
    path.write_bytes(jsonl(*rows, mark=mark, end=end))
    assert read(path) == TEXTS
    assert first_columns(str(path)) == tuple(rows[0])


@pytest.mark.parametrize("mark", [False, True], ids=["bare", "marked"])
def test_prompts_of_a_text_file_are_its_lines(tmp_path, mark):
    path = tmp_path / "a.txt"
    path.write_bytes("\r\n".join(TEXTS).encode("utf-8-sig" if mark else "utf-8"))
    assert list(read_prompts([], path, chat=False).items()) == [(f"{path}:{i}", t) for i, t in enumerate(TEXTS, 1)]


def test_a_file_of_prompts_is_json_by_its_own_ending_or_that_below_the_packing(tmp_path):
    content = b'{"prompt": "a"}\n'
    for name, made, prompt in (
        ("a.jsonl", content, "a"),
        ("a.jsonl.gz", gzip.compress(content), "a"),
        ("a.jsonl.txt", content, content.decode().strip()),
        ("a.txt.gz", gzip.compress(content), content.decode().strip()),
    ):
        (tmp_path / name).write_bytes(made)
        assert list(read_prompts([], tmp_path / name, chat=False).values()) == [prompt]


def test_the_judge_reads_answers_with_any_separator(tmp_path):
    samples = [
        {"doc_id": i, "doc": {"instruction": text, "dataset": "a"}, "resps": [[text]]} for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "samples.jsonl").write_bytes(jsonl(*samples))
    assert write_outputs(tmp_path / "samples.jsonl", tmp_path / "out.json", "me") == len(TEXTS)
    assert [row["instruction"] for row in json.loads((tmp_path / "out.json").read_text())] == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": ', r"a\.jsonl:3 is not a JSON object"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 is not a JSON object \(got \[1\]\)"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not a JSON object"),
        ("a.jsonl", b'{"a": 1}\n\xff', "is no text in UTF-8"),
        ("a.jsonl", "{}".encode("utf-16"), "is no text in UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-5], "cannot be read after line 1: EOFError"),
        ("a.jsonl", None, "There is no file"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(read_objects(tmp_path / name))


def test_half_a_character_in_a_text_to_measure_is_named_by_row(tmp_path):
    rows = [{"prefix": "", "text": "fine"}, {"prefix": "", "text": "a\ud800"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"Row 2 of .*a\.jsonl': the text has half of a character"):
        read_samples(tmp_path / "a.jsonl", Columns())
