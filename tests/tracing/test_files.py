"""Pages and pictures: complete, self-contained, and safe whatever the tokens are."""

import json
import re
from html.parser import HTMLParser

import pytest
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from tracing_scenes import block, record
from transformers import PreTrainedTokenizerFast

from l2d_framework.errors import ConfigError, install
from l2d_framework.tracing import Trace, check_trace_file, write_page, write_trace
from l2d_framework.tracing.page import token_texts

HOSTILE = [
    "</script>",
    "<!--",
    "<script>",
    "<b>",
    "&amp;",
    "a\nb",
    "$x^$",
    "\u2028",
    "日本",
    "\U0001f600",
    '"',
    "\\",
    "%s",
    "\t",
]


def hostile_tokenizer():
    """A token for every text that could break a page or a picture."""
    vocabulary = {text: index for index, text in enumerate(["a", *HOSTILE])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


class Page(HTMLParser):
    """Scripts, and the attributes by which a page loads something."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.links, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        if tag not in ("meta", "input", "link"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))


def page_of(tmp_path, trace, tokenizer, title="A title"):
    path = tmp_path / "trace.html"
    write_page(trace, tokenizer, path, title=title)
    assert [child.name for child in tmp_path.iterdir()] == ["trace.html"]
    return path.read_text(encoding="utf-8")


def hostile_trace():
    size = len(HOSTILE) + 1
    return record(block(4, size, size), list(range(size)), top=size)


def test_the_embedded_json_is_the_trace_and_every_text_whatever_the_tokens(tmp_path):
    trace, tokenizer = hostile_trace(), hostile_tokenizer()
    text = page_of(tmp_path, trace, tokenizer, title="</title><script>alert(1)</script> @@DATA@@ & more")
    page = Page(text)
    assert not page.open
    (attributes, data), (_, program) = page.scripts
    assert attributes == {"type": "application/json", "id": "data"}
    found = json.loads(data)
    assert found["trace"] == trace.to_json()
    assert Trace.from_json(found["trace"]).to_json() == trace.to_json()
    assert found["title"] == "</title><script>alert(1)</script> @@DATA@@ & more"
    assert [found["texts"][str(index)] for index in range(1, len(HOSTILE) + 1)] == HOSTILE
    assert "innerHTML" not in program and "eval(" not in program


def test_a_page_loads_nothing(tmp_path):
    text = page_of(tmp_path, record(block(3, 4, 30)), tiny_tokenizer())
    assert not re.search(r"https?://|@import|url\(|<link", text)
    assert Page(text).links == []
    assert "default-src 'none'" in text


def test_texts_join_to_what_the_tokenizer_decodes():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(" two words\n<b>", add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts[token] for token in ids) == tokenizer.decode(ids)


def test_a_space_before_the_first_word_is_kept_where_the_tokenizer_drops_it():
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "▁a": 1, "b": 2}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    assert fast.decode([1]) == "a"
    assert token_texts(fast, [0, 1, 2]) == {0: "a", 1: " a", 2: "b"}


def test_half_characters_special_tokens_and_unknown_ids_have_a_name():
    tokenizer = tiny_tokenizer()
    half, other = tokenizer.encode("é", add_special_tokens=False)
    texts = token_texts(tokenizer, [half, other, 2, 999])
    assert texts == {half: "Ã", other: "©", 2: "</s>", 999: "⟨999⟩"}


def test_a_picture_is_drawn_for_short_and_long_sequences_and_any_token(tmp_path):
    pytest.importorskip("matplotlib")
    for name, trace in (("short", hostile_trace()), ("long", record(block(3, 80, 15), top=3, memory=0))):
        path = tmp_path / f"{name}.png"
        write_trace(trace, hostile_tokenizer(), path, title="$ a title\n日本 $")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["long.png", "short.png"]


def test_a_picture_needs_matplotlib_and_a_page_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(install("l2d-framework[plots]"))):
        check_trace_file(tmp_path / "trace.png")
    check_trace_file(tmp_path / "trace.html")


def test_a_file_that_could_not_be_written_is_refused_beforehand(tmp_path):
    (tmp_path / "there.html").write_text("mine")
    for name, message in (("trace.txt", ".html or .png"), ("there.html", "exists"), ("no/trace.html", "is missing")):
        with pytest.raises(ConfigError, match=message):
            check_trace_file(tmp_path / name)
    assert (tmp_path / "there.html").read_text() == "mine"
