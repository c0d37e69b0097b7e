"""Measures of the TESS 2 tables on random models."""

import json
import string

import pytest
import torch
from tiny_models import tiny_tokenizer
from tiny_runs import tess_run, write_base, write_sums
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from l2d_bench.measures.base import Subject
from l2d_bench.measures.loss import LossMeasure
from l2d_bench.measures.questions import QuestionsMeasure
from l2d_bench.measures.rewards import RewardMeasure
from l2d_bench.measures.samples import SamplesMeasure
from l2d_bench.measures.text import TextMeasure
from l2d_bench.measures.trace import TraceMeasure
from l2d_framework.config.parsing import parse_run
from l2d_framework.errors import DataError
from l2d_framework.training.output_dir import read_card
from l2d_framework.training.run import train_runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("base"), tie_word_embeddings=False)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    """A trained model's folder and its log."""
    folder = tmp_path_factory.mktemp("runs")
    run = tess_run(base, write_sums(folder / "sums.jsonl"), folder / "tess", max_steps=4, logging_steps=1)
    train_runs([parse_run(run)])
    return folder / "tess"


@pytest.fixture(scope="module")
def reward(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def subject(path, *, batch_size=4, **options):
    return Subject(str(path), options, seed=0, batch_size=batch_size, card=read_card(path))


PROMPTS = [f"{letter * 3}=" for letter in string.ascii_lowercase[:6]]


def test_a_model_agrees_with_itself_and_with_nobody_who_differs(model, write):
    asked = QuestionsMeasure(data=write([{"prompt": p, "completion": "?"} for p in PROMPTS[:5]]), canvas=12)
    answers = asked.run(subject(model)).texts
    assert len({answer["text"] for answer in answers}) > 1
    own = [{"prompt": answer["prompt"], "completion": answer["text"]} for answer in answers]
    measure = QuestionsMeasure(data=write(own), canvas=12)
    assert measure.run(subject(model, batch_size=2)).values["exact_match"].scores == [1.0] * 5
    other = [{**row, "completion": row["completion"] + "x"} for row in own]
    assert QuestionsMeasure(data=write(other), canvas=12).run(subject(model)).values["exact_match"].value == 0


def test_a_plain_language_model_is_measured_without_evaluations(base, write):
    measure = QuestionsMeasure(data=write([{"prompt": p, "completion": "?"} for p in PROMPTS]), canvas=8)
    assert measure.run(subject(base, num_inference_steps=0)).details["evaluations_per_token"] == 0


def test_options_of_the_subject_come_before_those_of_the_measure(model, write):
    data = write([{"prompt": p, "completion": "?"} for p in PROMPTS])
    measure = QuestionsMeasure(data=data, canvas=8, options={"num_inference_steps": 2})
    assert measure.run(subject(model)).details["evaluations_per_token"] == 2
    assert measure.run(subject(model, num_inference_steps=3)).details["evaluations_per_token"] == 3


def test_a_prompt_that_fills_the_canvas_is_refused(model, write):
    with pytest.raises(DataError, match="no room on a canvas of 4"):
        QuestionsMeasure(data=write([{"prompt": "abcd", "completion": ""}]), canvas=4).run(subject(model))


@pytest.mark.parametrize(
    ("rows", "said"), [([], "is empty"), ([{"prompt": "a"}], r"has no text under \['completion'\]")]
)
def test_files_without_rows_or_columns_are_refused(model, write, rows, said):
    with pytest.raises(DataError, match=said):
        QuestionsMeasure(data=write(rows), canvas=8).run(subject(model))


def test_a_reward_does_not_depend_on_batch_mates_and_is_read_behind_the_padding(model, reward, write):
    data = write([{"prompt": p} for p in PROMPTS])
    alone, together, longer = (
        RewardMeasure(data=data, model=str(reward), canvas=canvas).run(subject(model, batch_size=size)).values["reward"]
        for size, canvas in ((1, 24), (6, 24), (6, 25))
    )
    assert alone.scores == pytest.approx(together.scores, abs=1e-5)
    assert len(set(together.scores)) > 1
    assert together.scores != pytest.approx(longer.scores, abs=1e-5)


def test_guidance_by_a_reward_model_raises_the_reward_it_gives(model, reward, write):
    measure = RewardMeasure(data=write([{"prompt": p} for p in PROMPTS]), model=str(reward), canvas=24)
    guidance = {"name": "reward_gradient", "model": str(reward), "scale": 3000.0}
    plain, guided = measure.run(subject(model)), measure.run(subject(model, guidance=[guidance]))
    assert guided.values["reward"].value > plain.values["reward"].value


def test_continuations_are_judged_as_the_text_metrics_do(model, base, write):
    pytest.importorskip("mauve", reason="the extra text-metrics is not installed")
    data = write([{"text": f"{letter} text of some length, {letter}"} for letter in string.ascii_letters[:24]])
    measure = TextMeasure(data=data, judge=str(base), samples=24, prefix=8, length=8)
    found = measure.run(subject(model))
    assert set(measure.metrics()) >= set(found.values)
    assert {"perplexity", "distinct_4", "entropy", "mauve"} <= set(found.values)
    assert all(text["prompt"] == f"{letter} text o" for text, letter in zip(found.texts, "abcde", strict=True))
    with pytest.raises(DataError, match="24 texts of 16 tokens or more, fewer than the 25"):
        measure.model_copy(update={"samples": 25}).run(subject(model))


def test_samples_are_answers_to_the_first_prompts(model, write):
    data = write([{"prompt": p, "completion": "?"} for p in PROMPTS])
    shown = SamplesMeasure(data=data, canvas=12, limit=3, chat=False).run(subject(model)).texts
    assert shown == QuestionsMeasure(data=data, canvas=12).run(subject(model)).texts[:3]


def test_loss_curves_are_what_the_run_logged(model, base):
    log = json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    logged = [[entry["step"], entry["loss"]] for entry in log if "loss" in entry]
    found = LossMeasure().run(subject(model))
    assert found.curves["loss"] == logged
    assert found.values["last"].value == logged[-1][1]
    assert found.values["held_out"].value == [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    assert LossMeasure().run(subject(base)).curves == {}


def test_a_confidence_map_has_evaluations_down_and_positions_across(model, write):
    measure = TraceMeasure(data=write([{"prompt": p} for p in PROMPTS[:2]]), new_tokens=7)
    found = measure.run(subject(model, num_inference_steps=5))
    confidence = torch.tensor(found.matrix)
    assert confidence.shape == (5, 7)
    assert ((confidence > 0) & (confidence <= 1)).all()
    assert len(found.details["tokens"]) == 7
    assert measure.run(subject(model, num_inference_steps=1)).values["settled"].scores == [0.0, 0.0]
