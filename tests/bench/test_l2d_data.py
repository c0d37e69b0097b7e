"""What the tiny L2D tables learn from and ask: right answers, nothing asked that was trained on."""

import json

import pytest
from lm_eval.tasks import TaskManager

from l2d_bench import folder as bench_folder
from l2d_bench.data.l2d_data import L2DQuestions, held_out

ASKED = ("median", "other_skills", "expressions")


@pytest.fixture(scope="module")
def folder(datasets_dir, tmp_path_factory):
    made = tmp_path_factory.mktemp("l2d")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(datasets_dir)
        L2DQuestions().make(made)
        held_out()
    return made


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("asked", ASKED)
def test_no_question_that_is_asked_was_trained_on(folder, asked):
    trained = {row["prompt"] for name in ("base", "new") for row in rows(folder, name)}
    questions = {row["prompt"] for row in held_out()[asked]}
    assert len(questions) >= 490 and not questions & trained


def test_classes_are_those_that_the_tasks_propose(folder):
    assert {row["class"] for row in rows(folder, "new")} == {"math", "general"}


def test_the_new_skill_is_rare_in_pretraining_and_common_in_finetuning(folder):
    def share(name):
        found = rows(folder, name)
        return sum(row["prompt"].startswith("median") for row in found) / len(found)

    assert share("base") < 0.15 < 0.6 < share("new")


@pytest.mark.parametrize("asked", ASKED)
def test_tasks_ask_the_held_out_questions(folder, asked, datasets_dir, monkeypatch):
    monkeypatch.chdir(datasets_dir)
    manager = TaskManager(include_path=str(bench_folder() / "tasks"), include_defaults=False)
    task = manager.load([f"tiny_{asked}"])["tasks"][f"tiny_{asked}"]
    first, expected = task.test_docs()[0], held_out()[asked][0]
    assert task.doc_to_text(first) == expected["prompt"]
    assert task.doc_to_target(first) == expected["completion"].strip()
