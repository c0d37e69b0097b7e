"""Tuning of token search: on training items, row by row, into a file that the adapter reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_lm, tiny_tokenizer
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from l2d_framework.cli import app
from l2d_framework.errors import BusyError, ConfigError, OutputError
from l2d_framework.evaluation.harness.model import L2DLM
from l2d_framework.evaluation.search import tuning as search_tuning
from l2d_framework.evaluation.search.search import Search, read_search
from l2d_framework.evaluation.search.tuning import Question, grid, open_tasks, tune
from l2d_framework.training.folder_lock import locked_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
output_type: {output}
{splits}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
num_fewshot: {shots}
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3, {hint}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: {up}}}]
"""


def write_task(folder: Path, name: str, **fields: Any) -> None:
    known = {
        "output": "generate_until",
        "splits": "training_split: train",
        "shots": 0,
        "hint": "class_hint: sums",
        "up": "true",
    }
    text = TASK.format(name=name, folder=folder, **{**known, **fields})
    (folder / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random language model, and tasks whose training questions say train."""
    root = tmp_path_factory.mktemp("tuning")
    for part in (tiny_lm("llama"), tiny_tokenizer()):
        part.save_pretrained(root / "base")
    for split in ("train", "test"):
        rows = [{"question": f"{split} {n}", "answer": str(n)} for n in range(6)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tasks").mkdir()
    write_task(root, "tiny_hinted")
    write_task(root, "tiny_plain", hint="do_sample: false", splits="fewshot_split: train", shots=2)
    write_task(root, "tiny_tests_only", splits="fewshot_split: test")
    write_task(root, "tiny_choice", output="loglikelihood")
    write_task(root, "tiny_errors", up="false")
    write_task(root, "tiny_six_shots", splits="fewshot_split: train", shots=6)
    write_task(root, "tiny_code", hint="do_sample: false}\nunsafe_code: true\nmetadata: {version: 1")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def opened(folder: Path) -> L2DLM:
    return L2DLM(str(folder / "base"), device="cpu", num_inference_steps=0)


def question(folder: Path, *tasks: str, **fields: Any) -> Question:
    return Question(tasks, **{"limit": 3, "folder": folder / "tasks", **fields})


def scored(monkeypatch, score) -> list[tuple[str, Search]]:
    """Rows that were measured; their scores come from a function of task and settings."""
    measured = []

    def measure(lm, question, trained, settings):
        measured.append((trained.name, settings))
        row = {"metric": "acc,none", "error": None, "items": 3, "score": score(trained.name, settings)}
        return {"task": trained.name, "settings": settings.model_dump(), **row}

    monkeypatch.setattr(search_tuning, "_measure", measure)
    return measured


def test_training_items_alone_are_asked(folder, tmp_path, monkeypatch):
    lm, prompts = opened(folder), []
    inner = L2DLM.generate_until
    monkeypatch.setattr(
        L2DLM,
        "generate_until",
        lambda self, requests, **k: prompts.extend(r.args for r in requests) or inner(self, requests, **k),
    )
    chosen = tune(lm, question(folder, "tiny_hinted", "tiny_plain"), grid(2, [0.0], [1.0], [1.0]), out=tmp_path / "s")
    assert len(prompts) == 6
    assert all("train" in text and "test" not in text for text, _ in prompts)
    assert all(kwargs["search_beams"] == 2 for _, kwargs in prompts)
    # A question is no example for itself.
    for text in (text for text, _ in prompts if text.count("train") > 1):
        *examples, last = [line.removesuffix("\n") for line in text.split("train ")[1:]]
        assert len(examples) == 2 and all(example.split()[0] != last for example in examples)
    assert set(chosen) == {"sums", "tiny_plain"}


def test_the_best_mean_of_a_category_is_chosen(folder, tmp_path, monkeypatch):
    scored(monkeypatch, lambda task, s: s.temperature * (1 if task == "tiny_hinted" else -3) + s.length_power)
    settings, out = grid(2, [0.0, 1.0], [1.0], [0.0, 0.5]), tmp_path / "search.json"
    one = tune(opened(folder), question(folder, "tiny_hinted", "math=tiny_plain"), settings, out=out)
    assert one == {name: read_search({"search": str(out)}, name).model_dump() for name in ("sums", "math")}
    assert (one["sums"]["temperature"], one["math"]["temperature"]) == (0.5, 0.0)
    both = tune(opened(folder), question(folder, "m=tiny_hinted", "m=tiny_plain"), settings, out=tmp_path / "both")
    assert both == {"m": Search(beams=2, length_power=1.0, temperature=0.0).model_dump()}


def test_the_least_is_chosen_where_less_is_better(folder, tmp_path, monkeypatch):
    scored(monkeypatch, lambda task, s: s.temperature)
    settings = grid(2, [0.0], [1.0], [0.5, 0.0, 1.0])
    chosen = tune(opened(folder), question(folder, "tiny_errors"), settings, out=tmp_path / "search.json")
    assert chosen["sums"]["temperature"] == 0.0


def test_rows_of_another_class_or_wording_are_not_taken_over(folder, tmp_path, monkeypatch):
    scored(monkeypatch, lambda task, s: s.temperature)
    settings, out = grid(2, [0.0], [1.0], [0.0]), tmp_path / "search.json"
    tune(opened(folder), question(folder, "tiny_hinted"), settings, out=out)
    shorter = L2DLM(str(folder / "base"), device="cpu", num_inference_steps=0, max_length=40)
    with pytest.raises(ConfigError, match=r"\(max_length: 128 there, 40 now\)"):
        tune(shorter, question(folder, "tiny_hinted"), settings, out=out)
    monkeypatch.setattr(search_tuning, "task_identity", lambda *_: "another wording")
    with pytest.raises(ConfigError, match=r"\(tasks\.tiny_hinted\.content: '\w+' there, 'another wording' now\)"):
        tune(opened(folder), question(folder, "tiny_hinted"), settings, out=out)


def test_a_file_that_cannot_be_written_is_found_before_the_first_row(folder, tmp_path, monkeypatch):
    measured = scored(monkeypatch, lambda task, s: s.temperature)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"--out .* cannot be written .* Choose another\."):
        tune(opened(folder), question(folder, "tiny_hinted"), grid(2, [0.0], [1.0], [0.0]), out=tmp_path / "file" / "s")
    assert measured == []


def test_a_file_that_another_process_writes_is_refused(folder, tmp_path, monkeypatch):
    measured = scored(monkeypatch, lambda task, s: s.temperature)
    out, rows = tmp_path / "search.json", grid(2, [0.0], [1.0], [0.0])
    with (
        locked_file(out, "--out"),
        pytest.raises(BusyError, match=r"--out '.*search\.json' is in use by process \d+ on"),
    ):
        tune(opened(folder), question(folder, "tiny_hinted"), rows, out=out)
    assert measured == []
    tune(opened(folder), question(folder, "tiny_hinted"), rows, out=out)
    assert not list(tmp_path.glob(".search.json*"))


def test_a_wrong_metric_is_refused_with_those_there_are(folder):
    with pytest.raises(ConfigError, match=r"no 'exact_mach,none'.*exact_match,none"):
        open_tasks(question(folder, "tiny_hinted", metric="exact_mach,none"))


def test_an_interrupted_run_goes_on_at_the_missing_row(folder, tmp_path, monkeypatch):
    measured = scored(monkeypatch, lambda task, s: s.temperature)
    settings, out = grid(2, [0.0, 1.0], [1.0], [0.0, 1.0]), tmp_path / "search.json"
    asked = question(folder, "tiny_hinted")

    def stopping(left):
        yield from left[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(opened(folder), asked, settings, out=out, track=stopping)
    with pytest.raises(ConfigError, match="no tuned category"):
        read_search({"search": str(out)})
    chosen = tune(opened(folder), asked, settings, out=out)
    assert [s for _, s in measured] == settings
    whole = tune(opened(folder), asked, settings, out=tmp_path / "whole.json")
    assert chosen == whole
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    with pytest.raises(ConfigError, match=r"another question \(limit: \d+ there, 4 now\)"):
        tune(opened(folder), question(folder, "tiny_hinted", limit=4), settings, out=out)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_hintde", "no single task"),
        ("tiny_tests_only", "not be chosen on those"),
        ("tiny_choice", "nothing to search for"),
        ("tiny_six_shots", "Add --num_fewshot 5 or less"),
        ("tiny_code", "--confirm_run_unsafe_code"),
    ],
)
def test_tasks_that_cannot_be_tuned_on_are_refused(folder, monkeypatch, name, message):
    small = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    monkeypatch.setattr(search_tuning, "task_manager", lambda *_: small)
    with pytest.raises(ConfigError, match=message):
        open_tasks(question(folder, name))


def test_the_command_tunes_and_the_adapter_takes_its_file(folder, tmp_path):
    out, model = tmp_path / "search.json", f"pretrained={folder / 'base'},num_inference_steps=0"
    arguments = ["tune-search", "--model_args", model, "--tasks", "tiny_hinted", "--out", str(out), "--limit", "2"]
    arguments += ["--beams", "2", "--temperatures", "0,1", "--length-powers", "0", "--repetition-penalties", "1"]
    arguments += ["--include_path", str(folder / "tasks"), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "chosen" in result.output and "2 items of train" in result.output
    assert len(json.loads(out.read_text())["rows"]) == 2
    searching = L2DLM(str(folder / "base"), device="cpu", num_inference_steps=0, search=str(out))
    assert searching.generator.plan({"until": [], "max_gen_toks": 3, "class_hint": "sums"}).search == read_search(
        {"search": str(out)}, "sums"
    )


@pytest.mark.parametrize("ways", [[], ["--apply_chat_template"]])
def test_the_command_that_is_printed_asks_as_tuning_did(folder, tmp_path, monkeypatch, ways):
    scored(monkeypatch, lambda task, settings: 0.0)
    arguments = ["tune-search", "--model_args", f"pretrained={folder / 'base'},num_inference_steps=0"]
    ways = [*ways, "--include_path", str(folder / "tasks")]
    result = CliRunner().invoke(
        app, [*arguments, "--tasks", "tiny_hinted", "--out", str(tmp_path / "search.json"), *ways]
    )
    assert result.exit_code == 0, result.output
    (printed,) = (line for line in result.output.splitlines() if line.startswith("Search with:"))
    assert printed.split()[5:] == [f"{arguments[-1]},search={tmp_path / 'search.json'}", *ways, "--tasks", "..."]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--temperatures", "0,warm"], "takes numbers"),
        (["--repetition-penalties", "0"], "at least"),
        (["--model_args", "pretrained=x,search_beams=3"], "this command is to choose"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_opened(changes, message):
    arguments = ["tune-search", "--model_args", "pretrained=x", "--tasks", "a", "--out", "b", *changes]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)
