"""Answers end where training taught that they end, also where that is not the base model's end-of-text token."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from diffusion_models import diffusion_lm, tess_lm
from tiny_models import tiny_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.config import parse_run
from l2d_framework.errors import ConfigError
from l2d_framework.generation.prompts import pad_left, turn_end
from l2d_framework.generation.results import Infilled
from l2d_framework.models.checkpoint import load
from l2d_framework.training.run import train_runs

EOS, END = 2, 3
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Its turns end in a token that the base model does not know as an end."""
CHAT = [{"role": "user", "content": "Two plus two?"}]
FEW = {"num_inference_steps": 3, "max_new_tokens": 5}


def only_ends(lm):
    """The language model with a generation configuration that leaves nothing to say but the end of a turn."""
    lm.generation_config.suppress_tokens = [i for i in range(lm.config.vocab_size) if i != END]
    return lm


def templated():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turn_end")
    only_ends(tiny_lm("llama")).save_pretrained(folder / "base")
    templated().save_pretrained(folder / "base")
    tiny_runs.write_sums(folder / "sums.jsonl")
    chats = [{"messages": [*CHAT, {"role": "assistant", "content": f"Four and {n}."}]} for n in range(8)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    for name, make in (("l2d", tiny_runs.diffusion_run), ("tess", tiny_runs.tess_run)):
        for data in ("chats", "sums"):
            run = make(folder / "base", folder / f"{data}.jsonl", folder / f"{name}-{data}", max_steps=1)
            run["training"] |= {"save_steps": 1, "eval_steps": None, "warmup_steps": 0}
            run["data"] |= {"eval_fraction": 0.0, "max_length": 64}
            train_runs([parse_run(run)])
    return folder


@pytest.fixture(params=["l2d", "tess"])
def trained(request, folder):
    """`trained(data)`: a model trained on it."""
    return lambda data: load(folder / f"{request.param}-{data}")


def lengths(lm, prompts, **options):
    return lm.generate(prompts, **{**FEW, **options}).lengths.tolist()


def test_what_ends_an_answer_in_training_is_recorded(folder):
    for name, ends in (("chats", [END]), ("sums", [EOS])):
        for kind in ("l2d", "tess"):
            assert json.loads((folder / f"{kind}-{name}" / "l2d.json").read_text())["ends"] == ends
            assert load(folder / f"{kind}-{name}").origin.ends == tuple(ends)


def test_the_recorded_end_stops_an_answer_however_the_prompt_is_given(trained):
    lm = trained("chats")
    prompts = ["Two plus two?", CHAT, torch.tensor([[9, 8, 7]]), pad_left([[9, 8, 7], [6]])]
    assert [set(lengths(lm, prompt)) for prompt in prompts] == [{1}] * 4
    assert lengths(lm, ["Two plus two?", CHAT]) == [1, 1]


def test_what_an_end_means_may_be_said_otherwise(trained):
    lm = trained("chats")
    assert lengths(lm, CHAT, eos_token_id=None) == lengths(lm, CHAT, eos_token_id=EOS) == [5]
    assert lengths(lm, CHAT, generation_config=GenerationConfig(eos_token_id=EOS + 5)) == [5]
    assert lengths(lm, CHAT, generation_config=GenerationConfig(eos_token_id=EOS)) == [1]
    assert lengths(lm, CHAT, generation_config=GenerationConfig()) == [1]
    assert lm.backbone.lm.generation_config.eos_token_id == EOS


def test_without_record_only_conversations_end_with_the_templates_turn(folder):
    for kind in ("l2d", "tess"):
        lm = load(folder / f"{kind}-chats")
        lm.origin = replace(lm.origin, ends=None)
        alone = [lengths(lm, prompt)[0] for prompt in ("Two plus two?", CHAT)]
        assert alone == [5, 1]
        assert lengths(lm, ["Two plus two?", CHAT]) == alone, "batch mates change nothing"
        assert lengths(lm, ["Two plus two?", CHAT], num_return_sequences=2) == [5, 5, 1, 1]
        assert lengths(lm, pad_left([[9, 8]], chats=[True])) == [1]
        assert lengths(lm, pad_left([[9, 8]])) == [5]


def test_settings_of_end_tokens_are_refused_where_they_would_not_hold_for_every_row(folder):
    lm = load(folder / "l2d-chats")
    lm.origin = replace(lm.origin, ends=None)
    for name, value in (("min_new_tokens", 3), ("min_length", 3), ("exponential_decay_length_penalty", (1, 2.0))):
        for prompts in (CHAT, "Two plus two?", [CHAT, CHAT]):
            lm.generate(prompts, **FEW, **{name: value})
        with pytest.raises(ConfigError, match=f"^{name}=.* in a call each"):
            lm.generate(["Two plus two?", CHAT], **FEW, **{name: value})
    both = {"min_new_tokens": 3, "eos_token_id": [EOS, END]}
    lm.generate(["Two plus two?", CHAT], **FEW, **both)
    lm.backbone.lm.generation_config.eos_token_id = [EOS, END]
    lm.generate(["Two plus two?", CHAT], **FEW, min_new_tokens=3)


def test_a_template_that_rewrites_answers_shows_no_end():
    template = TEMPLATE.replace("m['content']", "m['content']|upper").replace("{{ m['role'] }}", "<s>")
    assert turn_end(templated(), template) == EOS
    assert turn_end(templated(), TEMPLATE) == END


def test_a_checkpoint_of_before_the_record_is_loaded(folder, tmp_path):
    shutil.copytree(folder / "l2d-chats", tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "l2d.json").read_text()) | {"format": 1}
    del manifest["ends"]
    (tmp_path / "old" / "l2d.json").write_text(json.dumps(manifest))
    lm = load(tmp_path / "old")
    assert lm.origin.ends is None
    assert lengths(lm, CHAT) == [1]


def test_the_end_is_the_last_token_and_pads_follow(trained):
    found = trained("chats").generate([CHAT, CHAT], **FEW)
    assert found.answers[:, 0].tolist() == [END, END]
    assert not found.answers[:, 1:].any(), "nothing but the padding token 0"


def test_a_model_of_transformers_stops_there(folder):
    lm = load(folder / "l2d-chats")
    face, ids = lm.as_transformers(num_inference_steps=3), torch.tensor([[9, 8, 7]])
    assert torch.equal(face.generate(ids, max_new_tokens=5), lm.generate(ids, **FEW).sequences)
    assert face.generate(ids, max_new_tokens=5).shape[1] == 4
    assert face.generate(ids, max_new_tokens=5, num_beams=3).shape[1] == 4


@pytest.mark.parametrize("kind", ["l2d", "tess"])
@pytest.mark.parametrize("arguments", [("--chat", "--prompt"), ("--stream", "--chat", "--prompt"), ("--prompt",)])
def test_the_command_line_stops_there(folder, tmp_path, kind, arguments):
    how = ["--max-new-tokens", "5", "--num-inference-steps", "3", "--out", str(tmp_path / "out.jsonl")]
    found = CliRunner().invoke(app, ["generate", str(folder / f"{kind}-chats"), *arguments, "Two?", *how])
    assert found.exit_code == 0, found.exception
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["answers"][0]["text"] == ""
    assert row["answers"][0].get("tokens", 1) == 1


def test_a_language_model_learns_it_for_good(folder, tmp_path):
    run = tiny_runs.language_model_run(
        folder / "chats.jsonl", tmp_path / "lm", model={"base": str(folder / "base")}, training={"max_steps": 1}
    )
    run["training"] |= {"save_steps": 1, "eval_steps": None, "warmup_steps": 0}
    run["data"] |= {"eval_fraction": 0.0}
    train_runs([parse_run(run)])
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert lm.generation_config.eos_token_id == [EOS, END]
    assert lm.generate(torch.tensor([[9, 8]]), max_new_tokens=5).shape[1] == 3


def test_what_follows_an_end_in_its_gap_is_no_text():
    tokenizer = tiny_tokenizer()
    tokens = torch.tensor([[*b"..", 97, END, 98, 99, 100, END], [97, END, 98, 99, 97, 98, END, END]])
    blocks = torch.tensor([[-1, 0, 1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 1, 1, 1]])
    found = Infilled(tokens, blocks, torch.zeros(2), {})
    assert found.ended(()).sequences.tolist() == tokens.tolist()
    ended = found.ended([END]).sequences
    assert ended[0].tolist()[2:] == [97, END, END, 99, 100, END]
    assert ended[1].tolist() == tokens[1].tolist()
    assert len(found.ended([END]).texts(tokenizer)[0]) == len(found.texts(tokenizer)[0]) - 1


def test_a_gap_ends_where_training_taught_an_end():
    lm = tess_lm(tiny_lm("llama"), tokenizer=True, attention="bidirectional")
    text = "The cat <mask:6> sat <mask:3>."
    free = lm.infill(text)
    gap = free.sequences[0][free.blocks[0] >= 1].tolist()
    lm.origin = replace(lm.origin, ends=(gap[1],))
    ended = lm.infill(text)
    stop = gap.index(gap[1])
    assert ended.sequences[0][ended.blocks[0] >= 1].tolist()[:6] == [*gap[: stop + 1], *[gap[1]] * (5 - stop)]
    assert torch.equal(ended.sequences[ended.blocks == 0], free.sequences[free.blocks == 0])


def test_a_plain_language_model_answers_conversations_to_their_end():
    lm = diffusion_lm(only_ends(tiny_lm("llama")))
    lm.tokenizer = templated()
    assert lengths(lm, CHAT, num_inference_steps=0) == [1]
    assert lengths(lm, "Two plus two?", num_inference_steps=0) == [5]
