"""Questions with four answers: one is right, the others are wrong and of its kind."""

import pytest
from lm_eval.tasks import TaskManager

from l2d_bench import folder as bench_folder
from l2d_bench.protocols.distractors import with_choices

ROWS = [
    {"prompt": "largest 4 9 4 2 =", "completion": " 9"},
    {"prompt": "mean 5 5 5 5 =", "completion": " 5"},
    {"prompt": "sorted 3 1 2 2 =", "completion": " 1 2 2 3"},
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["prompt"])
def test_one_of_four_different_answers_is_right(row):
    asked = with_choices(row)
    assert asked == with_choices(row)
    assert len(set(asked["choices"])) == 4 and asked["choices"][asked["answer"]] == row["completion"]
    for choice in asked["choices"]:
        assert choice.startswith(" ") and all(word.isdecimal() for word in choice.split())
        assert len(choice.split()) == len(row["completion"].split())


def test_wrong_orders_hold_the_same_numbers():
    assert {tuple(sorted(choice.split())) for choice in with_choices(ROWS[2])["choices"]} == {("1", "2", "2", "3")}


def test_the_right_answer_stands_at_every_place():
    rows = [{"prompt": f"largest {n} 1 2 3 =", "completion": f" {n}"} for n in range(4, 80)]
    assert {with_choices(row)["answer"] for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["numbers", "sorting"])
def test_tasks_compare_the_answers(kind, datasets_dir, monkeypatch):
    monkeypatch.chdir(datasets_dir)
    manager = TaskManager(include_path=str(bench_folder() / "tasks"), include_defaults=False)
    task = manager.load([f"tiny_{kind}_choice"])["tasks"][f"tiny_{kind}_choice"]
    row = task.test_docs()[0]
    assert len(task.test_docs()) == 500
    assert task.doc_to_choice(row) == row["choices"] and task.doc_to_target(row) == row["answer"]
