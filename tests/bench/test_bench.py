"""`l2d bench`: jobs done once, shared, resumed, isolated; a cell is what lm_eval says."""

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench_jobs import Save, Touch
from forks import CONTEXT, Fork
from rich.console import Console
from tiny_runs import diffusion_run, language_model_run, write_base, write_sums
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager

from l2d_bench import cli as bench_cli
from l2d_bench import pool
from l2d_bench.bench import Bench
from l2d_bench.cells import FAILED
from l2d_bench.files import read_profile
from l2d_bench.jobs import Job, MeasureJob, ModelJob, make_maker
from l2d_bench.plan import NO_DATA, NOT_RERUN
from l2d_bench.pool import Event, Surroundings, run_jobs
from l2d_framework.cli import app
from l2d_framework.errors import BusyError, ConfigError
from l2d_framework.evaluation.harness import run as harness
from l2d_framework.training.folder_lock import locked

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


HERE = Surroundings(workers=0)
BENCH = """
import forks
from l2d_bench import pool
from l2d_framework.cli import main
pool._PROCESSES = forks.CONTEXT
main()
"""
COLUMNS = ["sums", "other", "both", "missing", "parameters"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model, sums, two runs of three updates, a task over the sums, a profile and two tables."""
    root = tmp_path_factory.mktemp("bench")
    base, sums = write_base(root / "base"), write_sums(root / "sums.jsonl")
    few = {"max_steps": 2, "eval_steps": None, "save_steps": 1}
    data = {"train": [{"path": str(sums)}], "max_length": 64}
    tuned = language_model_run(sums, root / "x", model={"base": str(base)}, training=few) | {"data": data}
    diffusion = diffusion_run(base, sums, root / "x", **few) | {"data": data}
    for name, run in (("tuned", tuned), ("l2d", diffusion)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(run))
    task = {
        "task": str(root / "sums_task.yaml"),
        "limit": 4,
        "generation": {"max_gen_toks": 2, "do_sample": True, "temperature": 1.0},
    }
    write_task(root / "sums_task.yaml", "sums_task", sums)
    profile = {
        "title": "micro",
        "seeds": [1, 2],
        "device": "cpu",
        "dtype": "float32",
        "measures": {
            "sums": {"kind": "task", **task},
            "other": {"kind": "task", **task, "num_fewshot": 1},
            "parameters": {"kind": "parameters"},
        },
        "columns": {
            "sums": {"measure": "sums", "metric": "characters,none", "scale": 10},
            "other": {"measure": "other", "metric": "characters,none", "scale": 10},
            "both": {"mean": ["sums", "other"]},
            "missing": {"no_data": "not here"},
            "parameters": {"measure": "parameters", "digits": 0},
        },
        "models": {
            "tuned": {"run": str(root / "tuned.yaml")},
            "l2d": {
                "run": str(root / "l2d.yaml"),
                "set": {"model.base": "model:tuned"},
                "options": {"num_inference_steps": 3},
            },
        },
    }
    table = {
        "title": "Micro",
        "reference": "none",
        "columns": COLUMNS,
        "rows": [
            {"label": "tuned", "model": "tuned"},
            {"label": "l2d", "model": "l2d"},
            {"label": "l2d spelt out", "model": "l2d", "options": {"solver": "midpoint", "num_inference_steps": 3}},
            {"label": "printed", "not_rerun": "printed only"},
        ],
        "figure": {"kind": "bars", "y": "tokens", "detail": "evaluations_per_token"},
    }
    steps = {"option": "num_inference_steps", "values": [1, 3]}
    second = {
        "title": "Second",
        "reference": "none",
        "columns": ["sums"],
        "rows": [{"label": "l2d", "model": "l2d", "sweep": steps}],
        "figure": {"kind": "lines", "x": "evaluations", "y": "tokens"},
    }
    for name, content in (("profile", profile), ("table", table), ("second", second)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return root


def write_task(path: Path, name: str, data: Path) -> None:
    """Task file: continue a sum; the score is the length of the answer, which even an untrained model varies in."""
    path.write_text(
        f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: completion
process_results: !function l2d_bench.protocols.tess.length
generation_kwargs: {{do_sample: true, temperature: 1.0, max_gen_toks: 2, until: []}}
metric_list: [{{metric: characters, aggregation: mean, higher_is_better: true}}]
"""
    )


def plan(scene: Path, out: Path, *tables: str, profile: str = "profile", **options: Any) -> Bench:
    return Bench([str(scene / f"{name}.yaml") for name in tables], str(scene / f"{profile}.yaml"), out, **options)


def changed(scene: Path, name: str, change: Any) -> str:
    """Name of a copy of the profile after `change(profile)`."""
    profile = yaml.safe_load((scene / "profile.yaml").read_text())
    change(profile)
    (scene / f"{name}.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
    return name


def run(bench: Bench) -> tuple[dict[str, str], list[Event]]:
    events: list[Event] = []
    bench.prepare()
    return run_jobs(bench.jobs, HERE, events.append), events


def done(events: list[Event]) -> list[str]:
    return [event.key for event in events if event.kind == "done"]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of the benchmark have their imports for free."""
    monkeypatch.setattr(pool, "_PROCESSES", CONTEXT)


@pytest.fixture(scope="module")
def finished(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, list[Event]]:
    """Both tables, run once in this process."""
    bench = plan(scene, tmp_path_factory.mktemp("out"), "table", "second")
    failures, events = run(bench)
    assert failures == {}
    return bench, events


def test_tables_share_models_and_results(finished):
    bench, events = finished
    assert len(done(events)) == len(set(done(events))) == len(bench.jobs)
    models = [job for job in bench.jobs.values() if isinstance(job, ModelJob)]
    assert len(models) == 2 * 2  # two models, two seeds
    table, second = bench.plans
    # 3 evaluations stand in three rows: by the model's options, spelt out, and in the sweep of the other table.
    assert table.cells[1, "sums"].jobs == table.cells[2, "sums"].jobs == second.cells[1, "sums"].jobs
    assert set(second.cells[0, "sums"].jobs).isdisjoint(second.cells[1, "sums"].jobs)


def test_models_come_before_what_needs_them(finished):
    bench, events = finished
    order = done(events)
    for key in order:
        assert all(order.index(need) < order.index(key) for need in bench.jobs[key].needs)


def test_a_finished_benchmark_does_nothing(scene, finished):
    again = plan(scene, finished[0].out, "table", "second")
    assert run(again) == ({}, [])


def test_goes_on_at_the_missing_row(scene, finished):
    bench, _ = finished
    keys = bench.plans[0].cells[1, "other"].jobs
    kept = {key: job.output.read_bytes() for key, job in bench.jobs.items() if isinstance(job, MeasureJob)}
    bench.jobs[keys[1]].output.unlink()
    failures, events = run(plan(scene, bench.out, "table"))
    assert failures == {} and done(events) == [keys[1]]
    found = {key: json.loads(bench.jobs[key].output.read_text())["outcome"]["values"] for key in kept}
    assert found == {key: json.loads(text)["outcome"]["values"] for key, text in kept.items()}


def test_a_cell_is_what_lm_eval_says(finished):
    from lm_eval import simple_evaluate

    from l2d_framework.evaluation.harness.model import L2DLM

    bench, _ = finished
    cell = bench.fill({})[0].cells[1, "sums"]
    values, scores = [], []
    for seed, key in zip(bench.profile.seeds, cell.jobs, strict=True):
        job = bench.jobs[key]
        assert isinstance(job, MeasureJob)
        lm = L2DLM(job.subject["path"], num_inference_steps=3, seed=seed, device="cpu", batch_size=2)
        folder = Path(job.measure["task"]).parent
        results = simple_evaluate(
            lm,
            tasks=["sums_task"],
            limit=4,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            gen_kwargs="max_gen_toks=2,do_sample=True,temperature=1.0",
        )
        values.append(results["results"]["sums_task"]["characters,none"])
        scores.append([sample["characters"] for sample in results["samples"]["sums_task"]])
        assert cell.seeds[seed]["value"] == pytest.approx(10 * values[-1])
        assert cell.seeds[seed]["error"] == pytest.approx(
            10 * results["results"]["sums_task"]["characters_stderr,none"]
        )
    assert cell.value == pytest.approx(10 * sum(values) / 2)
    items = [sum(pair) / 2 for pair in zip(*scores, strict=True)]
    spread = sum((item - sum(items) / 4) ** 2 for item in items) / 3
    assert cell.error == pytest.approx(10 * math.sqrt(spread / 4)) and cell.items == 4


def test_means_and_reasons(finished):
    filled = finished[0].fill({})[0]
    sums, other, both = (filled.cells[0, name] for name in ("sums", "other", "both"))
    assert both.value == pytest.approx((sums.value + other.value) / 2)
    assert both.error == pytest.approx(math.hypot(sums.error, other.error) / 2)
    assert {filled.cells[number, "missing"].reason for number in range(3)} == {NO_DATA}
    assert {filled.cells[3, name].reason for name in COLUMNS} == {NOT_RERUN}
    card = json.loads((next(iter(finished[0].out.glob("models/l2d-s1-*"))) / "run.json").read_text())
    assert filled.cells[1, "parameters"].value == card["parameters"]["trainable"]


def test_a_failing_row_leaves_the_others_alone(scene, tmp_path, monkeypatch):
    def broken(profile: dict[str, Any]) -> None:
        profile["seeds"] = [1]
        profile["measures"]["other"]["generation"] = {"max_gen_toks": 2, "no_such_option": 1}

    bench = plan(scene, tmp_path, "table", profile=changed(scene, "broken", broken))
    failures, _ = run(bench)
    filled = bench.fill(failures)[0]
    assert filled.has_failed
    assert {filled.cells[number, "other"].reason for number in range(3)} == {FAILED}
    assert "no_such_option" in filled.cells[0, "other"].text
    assert all(filled.cells[number, "sums"].value is not None for number in range(3))
    assert filled.cells[0, "both"].reason == FAILED and filled.cells[3, "other"].reason == NOT_RERUN

    # A model that cannot be trained fails what needs it, and says why, once.
    bench = plan(scene, tmp_path / "2", "table", profile="broken")
    monkeypatch.setattr(ModelJob, "do", lambda self, report: (_ for _ in ()).throw(ConfigError("no such thing")))
    failures, _ = run(bench)
    assert {text for key, text in failures.items() if not key.startswith("model-")} == {
        "could not train tuned, seed 1: no such thing"
    }


def test_a_result_of_other_settings_is_another_result(scene, finished):
    bench, _ = finished
    known = set(bench.jobs)

    def keys(name: str, change: Any) -> set[str]:
        return set(plan(scene, bench.out, "table", profile=changed(scene, name, change)).jobs)

    assert keys("same", lambda profile: profile.update(batch_size=3)) <= known
    longer = keys("longer", lambda profile: profile["models"]["tuned"].update({"set": {"training.max_steps": 4}}))
    # The base is trained longer, so that everything over it is new, and nothing else is there.
    assert longer.isdisjoint(known)
    more = keys("more", lambda profile: profile["measures"]["sums"].update(limit=3)) - known
    assert more and all(key.startswith("sums-") for key in more)
    text = (scene / "sums_task.yaml").read_text()
    (scene / "sums_task.yaml").write_text(text.replace("doc_to_text: prompt", 'doc_to_text: "{{prompt}} "'))
    harness._index.cache_clear()
    try:
        assert not any(key in known for key in plan(scene, bench.out, "second").jobs if key.startswith("sums-"))
    finally:
        (scene / "sums_task.yaml").write_text(text)
        harness._index.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["columns"].pop("other"), "has a column 'other' that the profile lacks"),
        (lambda p: p["columns"]["sums"].update(measure="summs"), "measure 'summs', which the profile lacks; did you"),
        (lambda p: p["measures"]["sums"].update(kind="tusk"), "measures.sums.kind: unknown, got 'tusk'; did you mean"),
        (lambda p: p["measures"]["sums"].update(task="gsm8kk"), "Unknown task 'gsm8kk'; did you mean"),
        (lambda p: p["measures"]["parameters"].update(x=1), "measures.parameters.x: unknown field"),
        (lambda p: p["columns"]["parameters"].update(metric="trained"), "'trained', which its measure lacks"),
        (lambda p: p["models"].pop("tuned"), "the profile has no model 'tuned'"),
        (lambda p: p["models"]["l2d"].update(options={"solvr": "euler"}), "Unknown model argument solvr='euler'; did"),
        (lambda p: p["models"]["l2d"].update(options={"solver": "midpoint", "num_inference_steps": 4}), "row 'l2d'"),
        (lambda p: p["models"]["l2d"].update(set={"training.max_stepps": 4}), "models.l2d, from"),
        (lambda p: p["models"]["tuned"].update(set={"model.base": "model:l2d"}), "starts from itself"),
        (lambda p: p["models"]["tuned"].update(stage=1), "holds one run, so leave stage out"),
        (lambda p: p["models"]["tuned"].update(set={"model.base": "data:nothing/x"}), "makes no data 'nothing'"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(scene, tmp_path, monkeypatch, change, message):
    # All of lm_eval's tasks take ten seconds to read.
    few = TaskManager(include_path=str(Path(lm_eval.__file__).parent / "tasks" / "gsm8k"), include_defaults=False)
    index = harness._index
    monkeypatch.setattr(harness, "_index", lambda *a, has_defaults=False, **o: few if has_defaults else index(*a, **o))
    with pytest.raises(ConfigError) as caught:
        plan(scene, tmp_path, "table", profile=changed(scene, "wrong", change))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_in_the_middle_goes_on_where_it_was(scene, finished, tmp_path, monkeypatch):
    bench, _ = finished
    arguments = ["bench", "second.yaml", "--profile", "profile.yaml", "--out", tmp_path, "--workers", 1]
    monkeypatch.chdir(scene)
    with Fork(tmp_path, BENCH, *arguments) as killed:
        while not list(tmp_path.glob("results/*.json")):
            assert killed.process.is_alive(), killed.printed()
            time.sleep(0.05)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("results/*.json")}
    assert before
    # What the killed one had, and an uninterrupted run of the same profile in another folder, give the same numbers.
    failures, events = run(plan(scene, tmp_path, "second"))
    assert failures == {}
    assert {f"{key}.json" for key in done(events)}.isdisjoint(before)
    for path in tmp_path.glob("results/*.json"):
        here, there = (json.loads((folder / "results" / path.name).read_text()) for folder in (tmp_path, bench.out))
        assert here["outcome"]["values"] == there["outcome"]["values"]


def test_data_that_cannot_be_made_fail_only_what_needs_them(scene, tmp_path, monkeypatch):
    def gone(change):
        change["data"] = {
            "gone": {"kind": "data_set_rows", "path": str(scene), "split": "nothing", "columns": {"a": "b"}}
        }
        change["models"]["tuned"]["set"] = {"data.train.0.path": "data:gone/rows.jsonl"}

    bench = plan(scene, tmp_path, "second", profile=changed(scene, "gone", gone))
    failures, _ = run(bench)
    assert any("could not make gone" in text for text in failures.values())


def test_a_figure_shows_columns_of_its_table(scene, tmp_path):
    table = yaml.safe_load((scene / "second.yaml").read_text())
    table["figure"] = {"kind": "bars", "columns": ["nothing"]}
    (scene / "pictured.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(ConfigError, match="shows a column 'nothing' that the table lacks"):
        plan(scene, tmp_path, "pictured")


@pytest.mark.usefixtures("forked")
def test_an_interrupted_run_writes_what_there_is(scene, tmp_path, monkeypatch):
    arguments = ["bench", str(scene / "second.yaml"), "--workers", "1"]
    arguments += ["--profile", str(scene / "profile.yaml"), "--out", str(tmp_path)]
    monkeypatch.chdir(scene)
    is_over = threading.Event()

    def interrupt() -> None:
        while not list(tmp_path.glob("models/*")) and not is_over.wait(0.05):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        result = CliRunner().invoke(app, arguments)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        is_over.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 143, result.output
    assert "not run yet" in (tmp_path / "second.md").read_text()


@pytest.mark.usefixtures("forked")
def test_a_job_that_saves_when_it_is_ended_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_PATIENCE", 0.1)
    jobs = {name: Save(name, name, tmp_path / name, ()) for name in ("one", "two")}

    def interrupt() -> None:
        while len(list(tmp_path.glob("*.began"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, Surroundings(workers=2, logs=tmp_path / "logs"), lambda event: None)
    thread.join()
    assert all((tmp_path / name).is_file() for name in jobs)


def test_without_a_terminal_a_long_job_says_how_far_it_is(scene, tmp_path, monkeypatch, capsys):
    made = plan(scene, tmp_path, "second")
    key = next(iter(made.jobs))

    def work(_: object, __: object, notify: Any) -> dict[str, str]:
        for event in (Event("started", key), Event("running", key, 3, 8, "loss 1.5"), Event("done", key)):
            notify(event)
        return {}

    monkeypatch.setattr(pool, "run_jobs", work)
    monkeypatch.setattr(bench_cli, "_EVERY", -1.0)
    bench_cli._run(Console(), made, Surroundings(0))
    assert "3/8 loss 1.5" in capsys.readouterr().out


def test_when_the_time_is_over_who_listens_to_sigterm_hears_of_it(scene, tmp_path, monkeypatch):
    heard = []

    def work(*_: object) -> dict[str, str]:
        before = signal.signal(signal.SIGTERM, lambda signum, _: heard.append(signum))
        try:
            while not heard:
                time.sleep(0.01)
        finally:
            signal.signal(signal.SIGTERM, before)
        raise KeyboardInterrupt

    monkeypatch.setattr("l2d_bench.cli._run", work)
    monkeypatch.chdir(scene)
    arguments = ["bench", str(scene / "second.yaml"), "--profile", str(scene / "profile.yaml"), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--minutes", "0.05"])
    assert result.exit_code == 0, result.output
    assert heard == [signal.SIGTERM] and "The time is over" in result.output


def test_other_code_makes_other_data(monkeypatch):
    maker = make_maker({"kind": "demo"})
    before = maker.code()
    assert make_maker({"kind": "demo", "seed": 1}).code() == before
    monkeypatch.setattr(type(maker), "sources", ("l2d_framework.demo.report",))
    assert maker.code() != before


def test_an_output_folder_may_be_called_like_a_profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpu").mkdir()
    assert read_profile("gpu").models
    answer = CliRunner().invoke(app, ["bench", "l2d_table1", "--profile", "tinny", "--check"])
    assert isinstance(answer.exception, ConfigError) and "did you mean 'tiny'" in str(answer.exception)


@pytest.mark.usefixtures("forked")
def test_a_process_that_dies_fails_its_job_only(tmp_path):
    jobs: dict[str, Job] = {
        "dies": Touch("dies", "die", tmp_path / "dies", (), code=3),
        "lives": Touch("lives", "live", tmp_path / "lives", ()),
        "last": Touch("last", "be last", tmp_path / "last", ("lives",)),
        "needs": Touch("needs", "need it", tmp_path / "needs", ("dies",)),
        "needs that": Touch("needs that", "need that", tmp_path / "needs that", ("needs",)),
    }
    failures = run_jobs(jobs, Surroundings(workers=1, logs=tmp_path / "logs"), lambda event: None)
    cause = "could not die: its process ended with code 3"
    assert failures == {"dies": "its process ended with code 3", "needs": cause, "needs that": cause}
    assert (tmp_path / "lives").is_file() and (tmp_path / "last").is_file()


def test_missing_data_are_no_data(scene, tmp_path):
    def absent(profile: dict[str, Any]) -> None:
        profile["models"]["tuned"]["set"] = {"data.train.0.path": "nobody/has_this"}

    bench = plan(scene, tmp_path, "table", profile=changed(scene, "absent", absent))
    assert bench.jobs == {}
    cells = bench.fill({})[0].cells
    assert {cells[number, "sums"].text for number in range(3)} == {"training data nobody/has_this cannot be reached"}


def test_a_second_start_in_one_folder_is_refused_before_anything_is_done(scene, tmp_path, monkeypatch):
    monkeypatch.chdir(scene)
    arguments = ["bench", str(scene / "second.yaml"), "--profile", str(scene / "profile.yaml"), "--out", str(tmp_path)]
    with locked(tmp_path, "--out"):
        before = set(tmp_path.iterdir())
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, BusyError) and "is in use by process" in str(result.exception)
        assert set(tmp_path.iterdir()) == before


def test_the_command_writes_table_numbers_and_picture(scene, finished, monkeypatch):
    bench, _ = finished
    arguments = ["bench", str(scene / "table.yaml"), "--profile", str(scene / "profile.yaml"), "--out", str(bench.out)]
    monkeypatch.chdir(scene)
    result = CliRunner().invoke(app, [*arguments, "--workers", "0", "--data", str(scene)])
    assert result.exit_code == 0, result.output
    assert "no data" in result.output and "not rerun" in result.output
    numbers = json.loads((bench.out / "table.json").read_text())
    assert [row["label"] for row in numbers["rows"]] == ["tuned", "l2d", "l2d spelt out", "printed"]
    assert numbers["rows"][0]["cells"]["sums"]["by_seed"].keys() == {"1", "2"}
    assert {"versions", "hardware", "commit", "threads_per_worker"} <= numbers.keys()
    report = (bench.out / "table.md").read_text()
    value = bench.fill({})[0].cells[0, "sums"]
    assert f"{value.value:.2f} ± {value.error:.2f}" in report
    assert report.count("| tuned |") == 2  # the table, and by seed
    pytest.importorskip("matplotlib")
    assert (bench.out / "table.png").stat().st_size > 10_000
