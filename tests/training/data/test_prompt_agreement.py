"""One encoding of prompts: what a model was trained on is what it meets when it answers, fills gaps and judges."""

import json

import pytest
import torch
from diffusion_models import fresh_lm
from tiny_models import ADDING, tiny_lm, tiny_tokenizer

from l2d_framework.config import DataSection, RewardRun, parse_run
from l2d_framework.evaluation.text.judge import Judge, Pretrained
from l2d_framework.evaluation.text.samples import Sample
from l2d_framework.generation.infill import read_gaps
from l2d_framework.generation.prompts import encode_prompts, encode_text
from l2d_framework.training.data.prepare import prepare
from l2d_framework.training.reward.data import PairWriter

CHAT = [{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four.", "tools": None}]
PROMPTS = {"text": "Two plus two? ", "begun": "<s>Two plus two? ", "empty_words": " ", "chat": CHAT[:1]}

over_tokenizers = pytest.mark.parametrize("adding", ADDING)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(here, tokenizer, row):
    """Tokens of the only row of a data set, and those supervised."""
    (here / "rows.jsonl").write_text(json.dumps(row) + "\n")
    section = DataSection.model_validate({"train": [{"path": "rows.jsonl"}], "max_length": 100})
    (found,) = prepare(section, tokenizer).train
    return found["input_ids"], [i for i, flag in zip(found["input_ids"], found["supervised"], strict=True) if flag]


@over_tokenizers
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompt_and_answer_are_the_same_tokens_in_training_and_generation(here, adding, prompt):
    tokenizer = tiny_tokenizer(chat=True, adding=adding)
    is_text = isinstance(prompt, str)
    row = {"prompt": prompt, "completion": "Four."} if is_text else {"messages": CHAT}
    ids, answer = trained(here, tokenizer, row)
    assert tokenizer.decode(answer) == "Four.</s>"
    assert [*encode_prompts(tokenizer, [prompt])[0], *answer] == ids
    assert ids.count(tokenizer.bos_token_id) <= 1


@over_tokenizers
@pytest.mark.parametrize("start", ["", "<s>"], ids=["bare", "begun"])
def test_what_stands_before_a_gap_is_the_beginning_of_a_text_in_training(here, adding, start):
    tokenizer = tiny_tokenizer(adding=adding)
    ids, _ = trained(here, tokenizer, {"text": f"{start}The cat sat."})
    gapped = read_gaps(tokenizer, [f"{start}The <mask:3> sat."], tiny_lm().config)
    known = (gapped.blocks[0] == 0).tolist()
    assert [token for token, here in zip(gapped.tokens[0].tolist(), known, strict=True) if here] == [
        token for token, here in zip(ids, known, strict=False) if here
    ]
    assert gapped.tokens.shape[1] == len(ids) - 1, "training adds an end of the text"


@over_tokenizers
@pytest.mark.parametrize("layout", ["tokenizer", "generation"])
def test_a_reward_model_reads_prompts_as_they_are_generated_from(adding, layout):
    run = parse_run({"kind": "reward", "model": {"base": "x"}, "data": {"train": [{"path": "x"}], "format": layout}})
    assert isinstance(run, RewardRun)
    tokenizer = tiny_tokenizer(chat=True, adding=adding)
    writer = PairWriter.of(run, tokenizer)
    prompt = encode_prompts(tokenizer, [CHAT[:1]], writer.encoder.template)[0]
    assert writer.ids(CHAT)[: len(prompt)] == prompt
    texts = [writer.ids(text) for text in ("A text.", "<s>A text.")]
    assert all(ids.count(tokenizer.bos_token_id) <= 1 for ids in texts)
    if layout == "tokenizer":
        assert texts[0] == [*encode_text(tokenizer, "A text."), tokenizer.eos_token_id]


def test_a_judge_begins_a_text_once_also_where_its_prompt_spells_the_beginning_out():
    lm = tiny_lm()
    judge = Judge(Pretrained("tiny", lm.config, tiny_tokenizer(adding="bos"), lambda: lm))
    found = judge.judge([Sample("The", " sky"), Sample("<s>The", " sky")], lambda batches, title: batches)
    assert found.nll[0] == found.nll[1] != 0
    assert found.tokens.tolist() == [4, 4]


@over_tokenizers
def test_generation_reads_the_prompt_that_training_taught(here, adding):
    lm = fresh_lm(tokenizer=True)
    lm.tokenizer = tiny_tokenizer(chat=True, adding=adding)
    for prompt in PROMPTS.values():
        row = {"prompt": prompt, "completion": "x"} if isinstance(prompt, str) else {"messages": [*prompt, CHAT[1]]}
        ids, answer = trained(here, lm.tokenizer, row)
        found = lm.generate(prompt, num_inference_steps=0, max_new_tokens=1)
        assert torch.equal(found.sequences[0, : found.prompt_length], torch.tensor(ids[: -len(answer)]))
