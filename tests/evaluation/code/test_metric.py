"""The metric `code_eval`: an unbiased estimate, over programs that run in the sandbox and nowhere else."""

import itertools
import json
import sys
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("evaluate")

import evaluate

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.code import metric
from l2d_framework.evaluation.code.metric import CodeEval, pass_at_k, passes, serve
from l2d_framework.evaluation.code.sandbox import ALLOW_NETWORK, CONSENT, Sandbox
from l2d_framework.evaluation.harness.start_up import steps
from l2d_framework.evaluation.harness.tasks import route

GOOD, BAD, TESTS = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a * b", "assert add(2, 3) == 5"


@pytest.fixture
def agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's consent, on a system that can isolate programs."""
    monkeypatch.setenv(CONSENT, "1")
    try:
        assert metric.SANDBOX.is_isolated
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`evaluate.load` as the library has it, which notes what it is asked for."""
    asked: list[str] = []
    monkeypatch.setattr(evaluate, "load", lambda path, *_, **__: asked.append(path))
    return asked


@pytest.mark.parametrize(("samples", "passed"), [(6, 0), (6, 1), (6, 4), (6, 6), (1, 1)])
def test_the_estimate_is_the_mean_over_all_choices_of_k_samples(samples, passed):
    marks = [number < passed for number in range(samples)]
    for k in range(1, samples + 1):
        hits = [any(choice) for choice in itertools.combinations(marks, k)]
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("numbers", [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_impossible_counts_are_refused(numbers):
    with pytest.raises(ValueError, match="samples"):
        pass_at_k(*numbers)


def test_programs_are_counted_by_problem(agreed):
    scores, results = CodeEval().compute(
        predictions=[[GOOD, BAD, GOOD], [BAD, BAD, "def"]], references=[TESTS, TESTS], k=[1, 2, 3, 10]
    )
    assert scores == pytest.approx({"pass@1": 1 / 3, "pass@2": 1 / 2, "pass@3": 1 / 2})
    found = {task: [entry["passed"] for _, entry in rows] for task, rows in results.items()}
    assert found == {0: [True, False, True], 1: [False, False, False]}
    assert "SyntaxError" in results[1][2][1]["result"]
    assert CodeEval().compute(predictions=[], references=[], k=[1]) == ({}, {})


def test_of_several_processes_the_first_alone_runs_programs(monkeypatch):
    monkeypatch.setenv(CONSENT, "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(Sandbox, "run", lambda *_: pytest.fail("a program ran"))
    scores, results = CodeEval().compute(predictions=[[GOOD, BAD]], references=[TESTS], k=[1])
    assert scores == {"pass@1": 0} and len(results[0]) == 2
    assert not passes("x = 1")


def test_the_time_limit_is_kept(agreed):
    slow = "import time\ntime.sleep(0.7)"
    assert passes(slow) and not passes(slow, timeout=0.3)


def test_nothing_runs_without_consent(monkeypatch):
    monkeypatch.delenv(CONSENT, raising=False)
    monkeypatch.setattr(Sandbox, "run", lambda *_: pytest.fail("a program ran"))
    for check in (lambda: passes("x = 1"), lambda: CodeEval().compute(predictions=[[GOOD]], references=[TESTS])):
        with pytest.raises(ConfigError, match=rf"--confirm_run_unsafe_code.*{CONSENT}=1"):
            check()


def test_only_code_eval_is_served(upstream):
    serve()
    serve()
    assert isinstance(evaluate.load("code_eval"), CodeEval)
    evaluate.load("exact_match")
    assert upstream == ["exact_match"]


@pytest.mark.parametrize(("model", "is_served"), [("l2d", True), ("hf", False)])
def test_only_the_model_l2d_changes_lm_eval(upstream, monkeypatch, model, is_served):
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", model, "--confirm_run_unsafe_code"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("L2D_PRETRAINED", "x")
    monkeypatch.setenv(CONSENT, "")
    before = sys.excepthook
    steps.check_command()
    assert isinstance(evaluate.load("code_eval"), CodeEval) is is_served
    assert (sys.excepthook is not before) is is_served
    assert (metric.os.environ[CONSENT] == "1") is is_served


def task(function: Any, *, unsafe_code: bool = True) -> Any:
    """What `route` reads of a task; lm_eval keeps a metric as its `__call__`."""
    metrics = {} if function is None else {"pass": function.__call__}
    config = SimpleNamespace(task="demo", unsafe_code=unsafe_code, process_results=None)
    return SimpleNamespace(config=config, _metric_fn_list=metrics)


def written_in(**names: Any) -> FunctionType:
    return FunctionType((lambda: None).__code__, names)


def test_consent_may_stand_in_a_file(monkeypatch, tmp_path):
    file = tmp_path / "run.yaml"
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for text, agreed in (
        ("model: l2d", ""),
        ("confirm_run_unsafe_code: true", "1"),
        ("confirm_run_unsafe_code: [", ""),
    ):
        file.write_text(text)
        monkeypatch.setenv(CONSENT, "")
        steps.prepare(["run", "--config", str(file)])
        assert metric.os.environ[CONSENT] == agreed


def test_isolation_is_tried_before_anything_is_asked(monkeypatch):
    monkeypatch.setenv(CONSENT, "")
    monkeypatch.delenv(ALLOW_NETWORK, raising=False)
    monkeypatch.setattr(metric, "SANDBOX", Sandbox())
    monkeypatch.setattr(Sandbox, "_outcome", lambda self, program, *, is_isolated: "refused: no namespaces")
    with pytest.raises(ConfigError, match="cannot run programs without network"):
        route(task(written_in(compute_=CodeEval())))


def test_every_way_to_execute_programs_leads_through_the_sandbox_or_is_refused(monkeypatch):
    monkeypatch.setenv(CONSENT, "")  # given back afterwards
    monkeypatch.setattr(Sandbox, "_outcome", lambda self, program, *, is_isolated: "passed")
    own = written_in(check_correctness=lambda program, timeout: True)
    route(task(own))
    assert own.__globals__["check_correctness"] is passes
    route(task(written_in(compute_=CodeEval())))
    route(task(written_in(run=eval), unsafe_code=False))
    for unknown in (written_in(run=eval), None):
        with pytest.raises(ConfigError, match="'demo' executes programs"):
            route(task(unknown))


def reference_problems(datasets_dir: Path) -> dict[str, list[tuple[str, str]]]:
    """Authors' solutions and tests of some problems, as the tasks of lm_eval put them together."""
    from pyarrow import parquet

    def rows(name: str, count: int) -> list[dict[str, Any]]:
        (path,) = (datasets_dir / name).rglob("test-*.parquet")
        return parquet.read_table(path).to_pylist()[:count]  # type: ignore[no-any-return]

    def checked(row: dict[str, Any]) -> tuple[str, str]:
        return row["prompt"] + row["canonical_solution"], f"{row['test']}\ncheck({row['entry_point']})"

    return {
        "humaneval": [checked(row) for row in rows("openai/openai_humaneval", 12)],
        "humaneval_plus": [checked(row) for row in rows("evalplus/humanevalplus", 4)],
        "mbpp": [(row["code"], "\n".join(row["test_list"])) for row in rows("google-research-datasets/mbpp/full", 12)],
    }


def test_the_authors_solutions_pass_and_empty_ones_fail(agreed, datasets_dir):
    for name, problems in reference_problems(datasets_dir).items():
        solutions, tests = zip(*problems, strict=True)
        good, results = CodeEval().compute(predictions=[[s] for s in solutions], references=tests, k=[1], timeout=10.0)
        assert good == {"pass@1": 1.0}, (name, json.dumps(results))
        empty, _ = CodeEval().compute(predictions=[["pass"]] * len(tests), references=tests, k=[1])
        assert empty == {"pass@1": 0.0}, name
