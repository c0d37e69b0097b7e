"""What the tiny TESS 2 tables learn from: right answers, nothing held out that was trained on."""

import json

import pytest
from tiny_runs import tess_run

from l2d_bench.data.masked_model import MaskedModel
from l2d_bench.data.tess_data import TessTexts
from l2d_framework.config.parsing import parse_run
from l2d_framework.models.checkpoint import build_model

KINDS = ("numbers", "sorting", "equations", "stories")


@pytest.fixture(scope="module")
def folder(datasets_dir, tmp_path_factory):
    made = tmp_path_factory.mktemp("tess")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(datasets_dir)
        TessTexts(questions=300, held_out=60).make(made)
    return made


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_out_is_neither_trained_on_nor_tried(folder, kind):
    trained = {row["prompt"] for row in rows(folder, "tune")}
    tried = {row["prompt"] for row in rows(folder, f"trial_{kind}")}
    held_out = {row["prompt"] for row in rows(folder, f"held_out_{kind}")}
    assert held_out
    assert not held_out & (tried | (trained if kind != "stories" else set()))


def test_answers_are_right(folder):
    for row in rows(folder, "held_out_sorting"):
        numbers = [int(word) for word in row["prompt"].split()[1:-1]]
        assert [int(word) for word in row["completion"].split()] == sorted(numbers)
    for row in rows(folder, "held_out_numbers"):
        *name, last = row["prompt"].removesuffix(" =").split(" ", 2 if row["prompt"].startswith("second") else 1)
        numbers = sorted(int(word) for word in last.split())
        ranks = {"largest": -1, "smallest": 0, "second largest": -2, "median": len(numbers) // 2}
        assert int(row["completion"]) == numbers[ranks[" ".join(name)]]
    for row in rows(folder, "held_out_equations"):
        expression = row["prompt"].removesuffix(" =").replace(" ", "")
        # Expressions are digits with one operator, and whole numbers may stand for rounded quotients.
        first, second = (
            int(part) for part in expression.replace("/", "+").replace("*", "+").replace("-", "+").split("+")
        )
        value = int(row["completion"].replace(" ", ""))
        exact = {"+": first + second, "-": first - second, "*": first * second}
        operator = next(letter for letter in expression if not letter.isdigit())
        assert operator == "/" or value == exact[operator]


def test_reward_models_share_no_prompt_and_every_pair_differs(folder):
    guiding, held_out = rows(folder, "preferences"), rows(folder, "preferences_held_out")
    assert not {row["prompt"] for row in guiding} & {row["prompt"] for row in held_out}
    assert all(row["chosen"] != row["rejected"] for row in guiding + held_out)


def test_the_same_seed_makes_the_same_files(folder, datasets_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(datasets_dir)
    TessTexts(questions=300, held_out=60).make(tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_a_masked_model_can_be_adapted(datasets_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(datasets_dir)
    config = {"model_type": "roberta", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config |= {"num_hidden_layers": 2, "max_position_embeddings": 130, "type_vocab_size": 1, "initializer_range": 0.3}
    MaskedModel(questions=300, held_out=60, config=config, vocab_size=300, max_steps=2, batch_size=2).make(tmp_path)
    run = tess_run(tmp_path, tmp_path / "rows.jsonl", tmp_path / "run")
    model = build_model(parse_run(run))
    assert model.tokenizer.mask_token_id == model.backbone.vocab_size - 1
    assert model.generate(["1 + 1 ="], max_new_tokens=4).answers.shape == (1, 4)
