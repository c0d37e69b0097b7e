"""What generation returns shows its answers as texts, and itself in a few words."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from diffusion_models import diffusion_lm, shared_lm, shared_tess
from tiny_models import tiny_tokenizer
from transformers.generation.streamers import BaseStreamer

from l2d_framework.config import SamplingSection
from l2d_framework.errors import ConfigError
from l2d_framework.generation.results import Generation, Infilled, html_table
from l2d_framework.tracing import Recorder
from l2d_plugins.solvers.runge_kutta import Euler

FEW = {"max_new_tokens": 4, "num_inference_steps": 3, "solver": "euler"}


def generation(texts, *, width=300):
    """A result with these texts as answers, each filled up with what is no text."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    answers = torch.full((len(ids), width), 7)
    for row, tokens in zip(answers, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    lengths = torch.tensor([len(tokens) for tokens in ids])
    evaluations = (torch.arange(width) < lengths[:, None]).long() * 15
    return Generation(torch.cat([torch.zeros(len(ids), 3).long(), answers], 1), evaluations, lengths, 3)


def test_texts_are_the_answers_without_prompt_end_and_padding():
    lm = shared_lm(tokenizer=True)
    found = lm.generate(["Hello", "Another one"], **FEW)
    rows = zip(found.answers.tolist(), found.lengths.tolist(), strict=True)
    assert found.texts() == [lm.tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in rows]
    assert found.texts(lm.tokenizer) == found.texts()
    tokenizer, texts = tiny_tokenizer(), ["one", "", "<b>two</b>"]
    assert generation(texts).texts(tokenizer) == texts
    with pytest.raises(ConfigError, match=r"There is no tokenizer .* texts\(tokenizer\)"):
        generation(texts).texts()


class Cells(HTMLParser):
    """Tags that are open at the end, and the text of every cell."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["td"]:
            self.cells[-1] += data


def test_html_holds_what_was_said_and_none_of_its_tags():
    texts = ["<script>alert('x')</script>", "a & b\n  c", '"quoted"']
    found = Cells(html_table("<t>", {"<name>": texts, "n": ["1", "2", "3"]}))
    assert found.open == []
    assert found.cells[::2] == texts


@pytest.mark.parametrize("count", [1, 3, 200])
def test_a_result_shows_itself_in_few_words_however_large_it_is(count):
    found = replace(generation(["A short one", *["x" * 290] * (count - 1)]), tokenizer=tiny_tokenizer())
    text, html = repr(found), found._repr_html_()
    assert text.startswith(f"Generation({count:,} answer")
    assert "15 evaluations per token" in text and "'A short one'" in text
    assert len(text) < 400 and len(html) < 8000
    assert not re.search(r"tensor|\d+, \d+, \d+", text + html)
    shown = Cells(html)
    assert shown.open == [] and len(shown.cells) == 3 * min(count, 10)
    assert (f"and {count - 10} more" in html) == (count > 10)


def test_infilled_texts_show_themselves_too():
    found = shared_tess(tokenizer=True, attention="bidirectional").infill(["12+<mask:3>=4", "1<mask:2>"])
    assert isinstance(found, Infilled)
    assert repr(found).startswith("Infilled(2 texts, 5 tokens filled in: '12+")
    assert Cells(found._repr_html_()).cells[0] == found.texts()[0]


def test_a_model_shows_what_it_is_and_no_weights():
    lm = diffusion_lm(classes=("math", "code"))
    lm.origin = type(lm.origin)(
        classes=("math",) * 500, sampling=SamplingSection(solver=Euler(), num_inference_steps=5)
    )
    own = sum(weight.numel() for weight in lm.own_parameters().values())
    wanted = ["embedding", "two_stream", "linear", "block_size=1", "euler, 5 evaluations", f"{own:,} own of", "float32"]
    assert [word for word in wanted if word not in repr(lm)] == []
    assert "classes=500" in repr(lm) and "\n" not in repr(lm) and len(repr(lm)) < 400
    shown = Cells(lm._repr_html_())
    assert shown.open == [] and {"embedding", "two_stream"} <= set(shown.cells)


class Tokens(BaseStreamer):
    def __init__(self):
        self.first, self.seen, self.is_over = None, [], False

    def put(self, value):
        self.seen += value.flatten().tolist()
        self.first = self.first or [*self.seen]

    def end(self):
        self.is_over = True


@pytest.mark.parametrize(
    ("model", "options"),
    [(shared_lm, {}), (shared_tess, {"block_size": 3}), (shared_lm, {"do_sample": True, "seed": 4})],
    ids=["l2d", "tess", "drawn"],
)
def test_streaming_and_recording_together_change_neither_tokens_nor_trace(model, options):
    lm = model(tokenizer=True)
    asked = {"max_new_tokens": 7, "num_inference_steps": 3} | options
    if model is shared_lm:
        asked["solver"] = "euler"
    plain = lm.generate("Hello", **asked)
    end = plain.answers[0, 4].item()
    results = []
    for streams, records in ((False, False), (True, False), (False, True), (True, True)):
        streamer, recorder = Tokens() if streams else None, Recorder() if records else None
        found = lm.generate("Hello", streamer=streamer, observer=recorder, eos_token_id=end, **asked)
        sequence = found.sequences[0, : found.prompt_length + int(found.lengths)].tolist()
        if streamer is not None:
            assert streamer.is_over and streamer.seen == sequence
        results.append((sequence, recorder and recorder.finish(sequence).to_json()))
    assert len({str(sequence) for sequence, _ in results}) == 1
    assert results[2][1] == results[3][1]


def test_filling_gaps_streams_and_records_what_it_fills_anyway():
    lm = shared_tess(tokenizer=True, attention="bidirectional")
    text, streamer, (alone, beside) = "12+<mask:3>=4<mask:1>", Tokens(), (Recorder(), Recorder())
    plain = lm.infill(text)
    lm.infill(text, observer=alone)
    found = lm.infill(text, streamer=streamer, observer=beside)
    sequence = found.sequences[0].tolist()
    assert sequence == plain.sequences[0].tolist() == streamer.seen
    assert streamer.is_over and lm.tokenizer.decode(streamer.first).endswith("12+")
    assert beside.finish(sequence).to_json() == alone.finish(sequence).to_json()
    assert beside.finish(sequence).is_predicted.sum() == 4
    with pytest.raises(ConfigError, match="A streamer takes one text, got 2"):
        lm.infill([text, text], streamer=streamer)


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        ({"num_inference_steps": 0}, True),
        ({"num_inference_steps": 1, "solver": "euler"}, True),
        ({"num_inference_steps": 3, "solver": "euler"}, False),
        ({"num_inference_steps": 0, "do_sample": True}, False),
        ({"num_inference_steps": 0, "num_return_sequences": 1}, False),
    ],
)
def test_answers_that_must_be_equal_are_told_and_no_others(recwarn, options, is_told):
    lm = shared_lm()
    found = lm.generate(torch.arange(5, 11)[None], max_new_tokens=12, **{"num_return_sequences": 3} | options)
    told = [str(warning.message) for warning in recwarn]
    assert (len(told) == 1 and "will be equal" in told[0]) if is_told else told == []
    if options.get("num_return_sequences") != 1:
        assert (len({str(row) for row in found.answers.tolist()}) == 1) == is_told
