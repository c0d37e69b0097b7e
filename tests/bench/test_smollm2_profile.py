"""The profile `smollm2` at a tiny size on the CPU, and what it is made of."""

import json
import signal

import pytest
from tiny_models import tiny_lm, tiny_tokenizer
from tiny_runs import diffusion_run, write_base, write_sums
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from l2d_bench.bench import Bench
from l2d_bench.data.templated import TemplatedRows
from l2d_bench.files import bench_folder
from l2d_bench.measures.base import Subject
from l2d_bench.measures.prompts import Answer, Answerer
from l2d_bench.measures.questions import QuestionsMeasure
from l2d_bench.measures.steps import StepsMeasure
from l2d_bench.pool import Surroundings, run_jobs
from l2d_framework.cli import app
from l2d_framework.config.files import read_file
from l2d_framework.config.parsing import parse_run
from l2d_framework.training.run import train_runs

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY = {
    "model.dtype": "float32",
    "training.bf16": False,
    "training.max_steps": 1,
    "training.batch_size": 4,
    "training.warmup_steps": 1,
    "training.save_steps": None,
    "training.dataloader_workers": 0,
    "data.max_length": 512,  # bytes
    "data.drop_unsupervised": True,
}


@pytest.fixture
def folder(tmp_path, datasets_dir, monkeypatch):
    """A working directory with a tiny model in place of the real one, and the data."""
    tiny_lm(max_position_embeddings=1024).save_pretrained(tmp_path / NAME)
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / NAME)
    for owner in datasets_dir.iterdir():
        if owner.is_dir() and not (tmp_path / owner.name).exists():
            (tmp_path / owner.name).symlink_to(owner)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny_profile():
    """The profile with models of one update and measures of two rows."""
    profile = read_file(bench_folder() / "profiles" / "smollm2.yaml") | {"device": "cpu", "dtype": "float32"}
    for key, model in profile["models"].items():
        if "run" in model:
            is_tess = key.startswith("tess")
            model["set"] = model.get("set", {}) | TINY
            model["set"] |= {f"data.train.{number}.limit": 8 for number in range(6 if key == "tess_adapted" else 4)}
            model["set"] |= {} if is_tess else {"parametrization.size": 8} if key.startswith("l2d") else {}
            if is_tess:
                del model["set"]["data.drop_unsupervised"]
    for measure in profile["measures"].values():
        if measure["kind"] == "steps":
            measure |= {"limit": 1, "steps": [count for count in measure["steps"] if count in (0, 1, 3, 15, 63)]}
        elif measure["kind"] == "questions":
            measure |= {"limit": 1, "canvas": 310, "options": {"num_inference_steps": 1}}
        elif measure["kind"] == "task":
            measure |= {"limit": 1, "generation": {"max_gen_toks": 2}}
            measure["task"] = measure["task"].replace("bbh_zeroshot", "bbh_zeroshot_navigate")  # one of 27
        elif measure["kind"] == "cost":
            measure |= {"limit": 1, "new_tokens": 2, "rounds": 1}
        elif measure["kind"] in ("diagnosis", "agreement"):
            measure |= {"limit": 2}
    return profile


def only(table, *labels):
    """A table of the package with some of its rows."""
    found = read_file(bench_folder() / "tables" / "own" / f"{table}.yaml")
    named = {row["label"]: row for row in found["rows"]}
    columns = [column for column in found["columns"] if column != "task, IFEval"]  # wants data of NLTK
    rows = [{"columns": columns} | named[label] for label in labels]
    for row in rows:
        row["columns"] = [column for column in row["columns"] if column in columns]
    if "figure" in found:
        found["figure"]["rows"] = labels
    return found | {"columns": columns, "rows": rows}


def test_the_profile_runs_to_its_end_at_a_tiny_size(folder):
    (folder / "tiny.yaml").write_text(json.dumps(tiny_profile()), encoding="utf-8")
    tables = {
        "quality": only("smollm2", "base", "LoRA", "L2D, Euler", "TESS 2"),
        "tasks": only("smollm2_tasks", "L2D", "TESS 2"),
    }
    for row in tables["tasks"]["rows"]:
        row["options"] = {"num_inference_steps": 1}
    for name, table in tables.items():
        (folder / f"{name}.yaml").write_text(json.dumps(table), encoding="utf-8")
    made = Bench([str(folder / f"{name}.yaml") for name in tables], str(folder / "tiny.yaml"), folder / "out")
    made.prepare()
    titles = [job.title for job in made.jobs.values()]
    assert titles.index("steps of lora, seed 0") < titles.index("train l2d, seed 0")  # whole rows, one after the other
    assert titles[-1].startswith("cost of tess")  # quality before tasks
    assert run_jobs(made.jobs, Surroundings(workers=0), lambda event: None) == {}
    quality, tasks = made.fill({})
    assert [place for place, cell in quality.cells.items() if cell.value is None] == [(0, "trained")]
    wanted = [row["columns"] for row in tables["tasks"]["rows"]]
    lacking = {column for (row, column), cell in tasks.cells.items() if cell.value is None and column in wanted[row]}
    assert lacking == {"writing, memory"}  # of a GPU only
    assert not (quality.has_failed or tasks.has_failed)
    assert any(path.suffix == ".png" for path in made.write(quality, {}))


def test_all_models_take_as_many_updates_of_as_many_chats():
    runs = read_file(bench_folder() / "runs" / "smollm2.yaml")["stages"]
    sizes = {tuple(run["training"][name] for name in ("max_steps", "batch_size", "bf16")) for run in runs}
    assert sizes == {(400, 64, True)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("steps")
    base, sums = write_base(root / "base"), write_sums(root / "sums.jsonl")
    train_runs([parse_run(diffusion_run(base, sums, root / "l2d", max_steps=1, eval_steps=None))])
    return root


def test_what_evaluations_reach_are_values_and_curves(trained):
    measure = StepsMeasure(data=str(trained / "sums.jsonl"), limit=4, steps=[0, 1, 2, 3])
    found = measure.run(Subject(str(trained / "l2d"), {"solver": "midpoint"}, seed=0))
    assert set(found.values) == {name for name in measure.metrics() if "_2" not in name}
    assert [point[0] for point in found.curves["nll"]] == [0, 1, 3]
    assert found.details["tokens_per_second"]["3"] > 0
    plain = measure.run(Subject(str(trained / "base"), {"num_inference_steps": 0}, seed=0))
    assert set(plain.values) == set(measure.metrics())
    assert len({value for _, value, _ in plain.curves["nll"]}) == 1
    assert {error for _, _, error in plain.curves["nll"]} == {plain.values["nll_3"].error}
    assert plain.values["nll_3"].value == pytest.approx(found.values["nll_0"].value)


def test_choices_and_chats_are_written_from_columns(tmp_path):
    source, out = tmp_path / "data.jsonl", tmp_path / "out"
    out.mkdir()
    source.write_text(json.dumps({"q": "Up?", "all": {"text": ["yes", "no"], "label": ["A", "B"]}, "key": "B"}) + "\n")
    fields = {"path": str(source), "choices": "all", "prompt": "{q}\n{choices}", "completion": "{key}"}
    TemplatedRows(**fields, chat=True).make(out)
    asked, answered = json.loads((out / "train.jsonl").read_text())["messages"]
    assert asked == {"role": "user", "content": "Up?\nA. yes\nB. no"}
    assert answered == {"role": "assistant", "content": "B"}


@pytest.mark.parametrize(
    ("text", "is_right"),
    [("It is 7, so 1,240.", 1), ("1240 is less than 7.", 0), ("I do not know.", 0), ("#### 1240", 1)],
)
def test_the_last_number_is_the_answer(trained, monkeypatch, text, is_right):
    monkeypatch.setattr(Answerer, "ask", lambda self, prompts, canvas: [Answer([], text, 1.0)])
    rows = trained / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "?", "completion": "7 and more\n#### 1,240"}) + "\n")
    measure = QuestionsMeasure(data=str(rows), canvas=9, answer=r"-?\d[\d,]*(?:\.\d+)?")
    found = measure.run(Subject(str(trained / "l2d"), {}, seed=0))
    assert found.values["exact_match"].value == is_right


def test_when_the_time_is_over_the_table_is_written_and_nothing_failed(folder):
    profile = tiny_profile()
    (folder / "tiny.yaml").write_text(json.dumps(profile), encoding="utf-8")
    arguments = ["bench", "own/smollm2", "--profile", "tiny.yaml", "--out", "out", "--minutes", "0"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells start what is to run in the background
    try:
        result = CliRunner().invoke(app, arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 0, result.output
    assert "The time is over" in result.output
    assert "not run yet" in (folder / "out" / "smollm2.md").read_text()
