"""The demo: its task, its statistics, its words, and a run from end to end that is too short to learn."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import l2d_framework as l2d
from l2d_framework.cli import app
from l2d_framework.config import parse_stages
from l2d_framework.demo import task
from l2d_framework.demo.measure import (
    ADAPTIVE,
    EVALUATIONS,
    FIXED,
    Denoising,
    Milestone,
    Outcome,
    Sheet,
    difference,
    in_default_way,
    score,
)
from l2d_framework.demo.report import Results, findings, learning_table, markdown, table, to_json
from l2d_framework.demo.run import FULL, QUICK, Demo, run_file
from l2d_framework.demo.task import NEW, OLD, OPERATIONS, Data, Question, Questions
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation import plots
from l2d_framework.training.output_dir import read_card
from l2d_framework.training.run import train_runs
from l2d_framework.training.tokenizer import train_tokenizer

LAWS: dict[str, Callable[[list[int], int], bool]] = {
    "largest": lambda numbers, y: y in numbers and all(x <= y for x in numbers),
    "smallest": lambda numbers, y: y in numbers and all(x >= y for x in numbers),
    "second largest": lambda numbers, y: y in numbers and rank(numbers, y, above=True) <= {0, 1},
    "second smallest": lambda numbers, y: y in numbers and rank(numbers, y, above=False) <= {0, 1},
    "mean": lambda numbers, y: len(numbers) * y <= sum(numbers) < len(numbers) * (y + 1),
    "median": lambda numbers, y: y in numbers and max(sum(x < y for x in numbers), sum(x > y for x in numbers)) <= 7,
}


def rank(numbers: list[int], y: int, *, above: bool) -> set[int]:
    """How many numbers beat y, strictly; and, if it is beaten by none, whether it stands there twice."""
    beating = sum(x > y if above else x < y for x in numbers)
    return {beating} if beating or numbers.count(y) > 1 else {2}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_is_what_the_operation_means(operation):
    for question in Questions(0).draw(200, {operation: 1.0}):
        assert LAWS[operation](list(question.numbers), int(question.completion))
        assert question.prompt == f"{operation} {' '.join(map(str, question.numbers))} ="


def test_no_question_is_ever_asked_twice_so_held_out_ones_are_new(monkeypatch):
    monkeypatch.setattr(task, "NUMBERS", 8)
    monkeypatch.setattr(task, "LENGTH", 1)
    source = Questions(0)
    training, held_out = source.draw(5, {NEW: 1.0}), source.draw(3, {NEW: 1.0})
    assert {question.numbers for question in training + held_out} == {(number,) for number in range(8)}


def test_the_parts_of_the_data_share_no_question_and_have_the_sizes_asked_for():
    data = QUICK.questions(0)
    assert [len(part) for part in data] == [QUICK.base, QUICK.new, QUICK.answers, QUICK.answers]
    assert len(set().union(*data)) == sum(map(len, data))
    assert {question.operation for question in data.new + data.held_out_new} == {NEW}
    assert [question.operation for question in data.held_out_old] == [
        name for name in OLD for _ in range(QUICK.answers // len(OLD))
    ]


def test_the_seed_decides_the_questions():
    assert QUICK.questions(1) == QUICK.questions(1)
    assert QUICK.questions(1) != QUICK.questions(2)


def test_the_base_model_seldom_sees_the_new_skill():
    asked = [question.operation for question in QUICK.questions(0).base]
    assert 0 < asked.count(NEW) / len(asked) < 0.1


def test_every_number_and_every_answer_is_one_token():
    data = QUICK.questions(0)
    tokenizer = train_tokenizer((text for q in data.base for text in (q.prompt, q.completion)), 512)
    for question in data.held_out_new + data.held_out_old:
        words = len(question.operation.split())
        assert len(tokenizer(question.prompt)["input_ids"]) == words + len(question.numbers) + 1
        assert len(tokenizer(question.completion)["input_ids"]) == 1


def test_the_standard_error_is_the_deviation_over_the_root_of_the_count():
    marks = np.arange(100) < 37
    assert score(marks).value == pytest.approx(0.37)
    assert score(marks).standard_error == pytest.approx(marks.std() / 10)


def test_the_error_of_a_difference_counts_what_the_questions_have_in_common():
    random = np.random.default_rng(0)
    hard = random.random(400) < 0.5
    first, second = hard & (random.random(400) < 0.8), hard | (random.random(400) < 0.1)
    gap = difference(first, second)
    assert gap.value == pytest.approx(score(second).value - score(first).value)
    covariance = np.cov(first.astype(float), second.astype(float))
    assert gap.standard_error**2 * 400 == pytest.approx(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert (difference(first, first).value, difference(first, first).standard_error) == (0.0, 0.0)


QUESTIONS = QUICK.questions(0)[2:]


def made_up(
    *,
    base: int = 10,
    few: int = 50,
    many: int = 50,
    lora: int = 50,
    middle_of_lora: int = 20,
    kept: tuple[int, int] = (100, 100),
) -> Results:
    """Results with so many right answers to 100 new questions, and to 100 old ones by LoRA and by L2D."""

    def sheet(questions: list[Question], right: int, evaluations: int) -> Sheet:
        answers = [q.completion if row < right else " none" for row, q in enumerate(questions)]
        return Sheet(questions, answers, [evaluations] * len(questions))

    def outcome(model: str, solver: str | None, new: int, old: int, evaluations: int = 1) -> Outcome:
        return Outcome(model, solver, sheet(QUESTIONS[0], new, evaluations), sheet(QUESTIONS[1], old, evaluations))

    solved = [
        outcome("l2d", solver, few if count == EVALUATIONS[0] else many, kept[1], count)
        for solver in FIXED
        for count in EVALUATIONS
    ]
    card = {
        "seconds": 1.0,
        "parameters": {"trainable": 7, "total": 8},
        "result": {"steps": 9},
        "config": {"training": {"draws_per_token": 4}},
    }
    outcomes = [
        outcome("base", None, base, 100),
        outcome("lora", None, lora, kept[0]),
        outcome("l2d", None, base, 100),
        *solved,
        outcome("l2d", ADAPTIVE, many, kept[1], 11),
    ]

    def milestone(updates: int, at: Outcome) -> Milestone:
        return Milestone(updates, at.new, at.old)

    start = milestone(0, outcomes[0])
    middle = milestone(5, outcome("lora", None, middle_of_lora, 100))
    learning = {
        "lora": [start, middle, milestone(9, outcomes[1])],
        "l2d": [start, *(milestone(updates, in_default_way(outcomes)) for updates in (5, 9))],
    }
    return Results(
        outcomes,
        learning,
        [
            Denoising(
                "it is the first",
                QUESTIONS[0][0].prompt,
                QUESTIONS[0][0].completion,
                [0.0, 1.0],
                [" 1", QUESTIONS[0][0].completion],
                [[0.5, 0.1], [0.2, 0.8]],
            )
        ],
        {"base": card, "lora": card, "l2d": card},
    )


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            {},
            "midpoint, exact match on the new skill rises by 0.400 ± 0.049 from 1 to 3 evaluations and does",
        ),
        ({"few": 10}, "midpoint, exact match on the new skill does not clearly change (+0.000 ± 0.000) from 1 to 3"),
        ({"few": 12, "many": 12}, "does not clearly change (+0.020 ± 0.014) from 1 to 3"),
        ({"many": 90}, "rises by 0.400 ± 0.049 from 3 to 31"),
        ({"many": 20}, "falls by 0.300 ± 0.046 from 3 to 31"),
        ({"lora": 90}, "LoRA is better by 0.400"),
        ({"lora": 20}, "L2D is better by 0.300"),
        ({"lora": 51}, "no clear winner (+0.010 ± 0.010)"),
        ({"kept": (5, 60)}, "LoRA and L2D forget; with L2D, a request for 1 evaluation brings the base model back"),
        ({"kept": (5, 100)}, "LoRA forgets."),
        ({"kept": (100, 5)}, "L2D forgets; with L2D, a request"),
        ({}, "that of LoRA rises by 0.300 ± 0.046 from 5 to 9; that of L2D does not clearly change (+0.000"),
        ({"middle_of_lora": 51}, "that of LoRA does not clearly change (-0.010 ± 0.010) from 5 to 9"),
        ({}, "Neither forgets."),
        (
            {},
            "fehlberg2 chooses 11.0 evaluations a token on average, from 11 to 11: no clear difference from midpoint",
        ),
        ({}, "the base model's own answer to 200 of 200 questions."),
    ],
)
def test_what_is_said_follows_from_the_numbers(numbers, said):
    assert said in "\n".join(findings(made_up(**numbers)))


def test_an_answer_at_one_evaluation_that_is_not_the_base_models_is_called_a_bug():
    results = made_up()
    results.one.new.answers[0] = " other"
    assert "199 of 200 questions, although" in findings(results)[0]


def test_table_report_and_json_hold_the_same_numbers():
    results = made_up(lora=37)
    data = Data([], [], *QUESTIONS)
    (lora,) = [row for row in table(results) if row[0] == "LoRA"]
    assert lora == ("LoRA", "-", "-", "0.370 ± 0.048", "1.000 ± 0.000")
    text = markdown(results, data, ["l2d generate it"])
    assert "| LoRA | - | - | 0.370 ± 0.048 | 1.000 ± 0.000 |" in text
    assert learning_table(results)[-1] == ("9", "0.370 ± 0.048", "1.000 ± 0.000", "0.500 ± 0.050", "1.000 ± 0.000")
    assert f"| {' | '.join(learning_table(results)[-1])} |" in text
    assert "l2d generate it" in text
    assert all(finding in text for finding in findings(results))
    numbers = json.loads(json.dumps(to_json(results)))["outcomes"][1]
    assert numbers["new"]["exact_match"] == pytest.approx(0.37)
    assert numbers["by_skill"][NEW] == numbers["new"]


def test_without_matplotlib_there_is_a_report_but_no_picture(tmp_path, monkeypatch):
    demo = Demo(tmp_path, QUICK, 0)
    monkeypatch.setattr("l2d_framework.demo.run.can_plot", lambda: False)
    files = demo.write(made_up())
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "results.json"]


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_the_run_file_is_one_that_any_user_could_write(size, tmp_path):
    base, lora, l2d_run = parse_stages(run_file(tmp_path, size, 3))
    assert (base.seed, lora.seed, l2d_run.seed) == (3, 3, 3)
    assert lora.training.max_steps == l2d_run.training.max_steps
    assert lora.data == l2d_run.data
    assert lora.model == l2d_run.model
    assert lora.model.base == base.output_dir


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A quick demo: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    found = call("--out", folder, "--quick")
    assert found.exit_code == 0, found.output
    yield SimpleNamespace(folder=folder, output=found.output)
    shutil.rmtree(folder.parent)


def test_a_quick_demo_writes_report_numbers_pictures_and_models(finished):
    names = {"report.md", "results.json", "runs.yaml", "data", "base", "lora", "l2d"}
    pictures = {"accuracy_vs_steps.png", "denoising.png"} if plots.can_plot() else set()
    assert {path.name for path in finished.folder.iterdir()} == names | pictures
    for name in pictures:
        assert (finished.folder / name).read_bytes().startswith(b"\x89PNG")
    assert f"l2d generate {finished.folder / 'l2d'} --prompt" in finished.output
    assert "quick run" in finished.output


def test_a_demo_measures_every_way_of_answering_and_counts_evaluations(finished):
    outcomes = json.loads((finished.folder / "results.json").read_text())["outcomes"]
    fixed = [(solver, count) for solver in FIXED for count in (3, 7, 15, 31)]
    assert [(one["solver"], one["evaluations"]["mean"]) for one in outcomes[2:-1]] == [(None, 1), *fixed]
    assert outcomes[-1]["solver"] == ADAPTIVE
    assert all(one["new"]["questions"] == one["old"]["questions"] == QUICK.answers for one in outcomes)


def test_a_demo_measures_its_finetunings_at_every_checkpoint_from_the_base_model_to_their_outcomes(finished):
    results = json.loads((finished.folder / "results.json").read_text())
    ends = {"lora": results["outcomes"][1], "l2d": next(o for o in results["outcomes"] if o["solver"] == "midpoint")}
    for name, stops in results["learning"].items():
        assert [stop["updates"] for stop in stops] == [0, 5, 10]
        assert stops[0]["new"] == results["outcomes"][0]["new"]
        assert stops[-1]["old"]["questions"] == ends[name]["old"]["questions"]
    assert results["learning"]["lora"][-1]["new"] == ends["lora"]["new"]


def test_at_one_evaluation_the_diffusion_model_is_the_base_model(finished):
    report = (finished.folder / "report.md").read_text()
    assert "200 of 200 questions." in report
    assert "\nl2d generate" in report  # whoever reads it elsewhere has another path


def test_the_demos_checkpoint_loads_and_answers(finished):
    model = l2d.load(finished.folder / "l2d")
    prompt = QUICK.questions(0).held_out_new[0].prompt
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    plain = model.backbone.lm(ids).logits[0, -1].argmax()
    assert model.generate([prompt], num_inference_steps=1, max_new_tokens=1).answers[0, 0] == plain


def test_denoising_starts_at_the_base_models_probabilities_and_ends_with_the_data(finished):
    model = l2d.load(finished.folder / "l2d")
    for shown in json.loads((finished.folder / "results.json").read_text())["denoisings"]:
        assert (shown["times"][0], shown["times"][-1], len(shown["times"])) == (0, 1, max(EVALUATIONS))
        ids = torch.tensor([model.tokenizer(shown["prompt"])["input_ids"]])
        plain = model.backbone.lm(ids).logits[0, -1].softmax(-1)
        for token, row in zip(shown["tokens"], shown["probabilities"], strict=True):
            numbers = [n for n in range(len(plain)) if model.tokenizer.decode([n]) == token]
            assert min(abs(row[0] - float(plain[n])) for n in numbers) < 1e-6


def test_a_finished_demo_is_not_trained_again(finished):
    runs = Demo(finished.folder, QUICK, 0).prepare()
    before = [read_card(finished.folder / name) for name in ("base", "lora", "l2d")]
    assert train_runs(runs, callbacks=lambda run: pytest.fail("nobody need hear of it")) == before


def test_a_demo_says_what_its_numbers_belong_to_and_what_is_trained_beside(finished, monkeypatch):
    titles = []

    def train(self, runs, callbacks, *, beside):
        base, _, l2d = runs
        assert beside
        for run in (base, l2d):
            (reporter,) = callbacks(run)
            reporter.close()
            titles.append(reporter._title.strip())

    monkeypatch.setattr(Demo, "train", train)
    monkeypatch.setattr("l2d_framework.demo.run.FULL", QUICK)
    monkeypatch.setattr("l2d_framework.cli.demo.os.cpu_count", lambda: 2)
    found = call("--out", finished.folder)
    assert found.exit_code == 0, found.output
    assert titles == ["1/4 base model", "2/4 L2D"]
    said = " ".join(found.output.split())
    assert "LoRA (3/4) is trained beside L2D (2/4)" in said
    assert ", LoRA beside L2D; this session" in said
    assert "beside" not in finished.output


def test_lora_is_trained_by_a_process_beside_that_ends_with_this_one(finished, monkeypatch):
    demo, commands, seen = Demo(finished.folder, QUICK, 0), [], []

    class Process:
        def __init__(self, command, **_):
            commands.append(command)
            self.stdin = SimpleNamespace(write=lambda text: seen.append("told"), close=lambda: None)

        def terminate(self):
            seen.append("terminated")

        def wait(self):
            seen.append("waited")

    monkeypatch.setattr("l2d_framework.demo.run.subprocess.Popen", Process)
    demo.train(demo.prepare(), lambda run: (), beside=True)
    assert not commands  # it is trained
    with monkeypatch.context() as patched:
        patched.setattr("l2d_framework.demo.run.read_card", lambda folder: None)
        demo.train(demo.prepare(), lambda run: (), beside=True)
    assert seen == ["told", "waited"]
    (command,) = commands
    assert command[-1] == "lora"
    with monkeypatch.context() as patched:
        patched.setattr("sys.argv", ["-c", *command[-2:]])
        patched.setattr("sys.stdin", io.StringIO("\n"))
        exec(command[command.index("-c") + 1])  # nothing is left to train
    with pytest.raises(KeyboardInterrupt), demo._training("lora"):
        raise KeyboardInterrupt
    assert seen[2:] == ["terminated", "waited"]


def test_a_demo_in_a_folder_with_another_seed_is_refused(finished):
    with pytest.raises(ConfigError, match="other settings, such as another seed"):
        Demo(finished.folder, QUICK, 1)
    Demo(finished.folder, QUICK, 0)


def test_a_folder_or_file_that_is_not_a_demos_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        found = call("--out", place, "--quick")
        assert isinstance(found.exception, ConfigError)
        assert "holds no demo" in str(found.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Demo(tmp_path / "file" / "out", QUICK, 0).prepare()
