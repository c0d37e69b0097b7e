"""lm_eval's command line with the model `l2d`: real tasks from local folders, several processes, missing pieces."""

import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import process_jobs
import psutil
import pytest
from diffusion_models import diffusion_lm, tess_lm
from tiny_models import tiny_lm, tiny_tokenizer
from tiny_runs import write_tasks
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

import lm_eval.tasks

from l2d_bench.protocols import folder
from l2d_framework.cli import app
from l2d_framework.config import ModelSection
from l2d_framework.errors import ConfigError, DataError, PluginError
from l2d_framework.evaluation.harness.command import run
from l2d_framework.evaluation.harness.start_up.steps import lacks_checkpoint
from l2d_framework.models.checkpoint import save

MODULE = ("-m", "l2d_framework.evaluation.harness")
SMALL = ("--limit", "4", "--num_fewshot", "0", "--gen_kwargs", "max_gen_toks=6")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    size = {"max_position_embeddings": 2048}
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.model_max_length = 2048
    base = tiny_lm("llama", **size)
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name, model in (("l2d", diffusion_lm(base)), ("tess", tess_lm(tiny_lm("llama", **size)))):
        section = ModelSection(base=str(root / "base"), dtype="float32")
        model.origin = dataclasses.replace(model.origin, model=section)
        model.tokenizer = tokenizer
        save(model, root / name)
    return {name: root / name for name in ("base", "l2d", "tess")}


def python(*arguments: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "1", **environ},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def outcome(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """results.json and, per task, the logged answers in the order of documents."""
    (results,) = folder.rglob("results_*.json")
    samples = {}
    for path in folder.rglob("samples_*.jsonl"):
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: (row["filter"], row["doc_id"]))
        samples[path.name.split("_2")[0]] = [(row["doc_id"], row["resps"]) for row in rows]
    return json.loads(results.read_text()), samples


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l2d", "tess"])
def test_real_tasks_run_offline_and_say_where_their_data_lie(folders, datasets_dir, tmp_path, name):
    scoring = "scoring=pseudo,num_inference_steps=3" if name == "tess" else "noise_samples=2,num_inference_steps=3"
    result = python(
        *MODULE, "--tasks", "gsm8k,arc_easy", *SMALL, "--batch_size", "3", "--log_samples", "--output_path", tmp_path,
        "--model_args", f"pretrained={folders[name]},{scoring}", "--apply_chat_template",
        "--system_instruction", "Be brief.", "--fewshot_as_multiturn", "true",
        cwd=datasets_dir,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results, samples = outcome(tmp_path)
    assert {"gsm8k", "arc_easy"} == results["results"].keys()
    assert {len(rows) for task, rows in samples.items() if "arc" in task} == {4}
    data = results["config"]["l2d"]["data"]
    assert data["gsm8k"]["local_folder"] == str((datasets_dir / "openai/gsm8k").resolve())
    assert "not from the hub" in result.stderr


LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def killed(*arguments: str | Path, cwd: Path, when: Callable[[], bool]) -> str:
    """What two processes say on standard error of which the second is killed in the midst of its work."""
    environ = {**os.environ, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCH, *map(str, arguments)]
    with subprocess.Popen(command, cwd=cwd, env=environ, stderr=subprocess.PIPE, text=True) as launched:
        while not when():
            assert launched.poll() is None
            time.sleep(0.02)
        children = psutil.Process(launched.pid).children(recursive=True)
        (second,) = [child for child in children if child.environ().get("RANK") == "1"]
        second.kill()
        _, said = launched.communicate(timeout=120)
        assert launched.returncode != 0
        return said


def known(cache: Path) -> int:
    """How many answers a cache of lm_eval holds."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"file:{cache}?mode=ro", uri=True)) as opened:
        return int(opened.execute("select count(*) from unnamed").fetchone()[0])
    return 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # of lm_eval
def test_where_one_of_two_processes_dies_the_same_command_goes_on_to_the_results_of_one(folders, tmp_path):
    model, tasks = folders["l2d"], write_tasks(tmp_path / "tasks", rows=14, tokens=8)
    evaluate = (
        "-m", "l2d_framework.cli", "eval", "--tasks", "sums,choice", "--include_path", tasks, "--log_samples",
        "--model_args", f"pretrained={model},num_inference_steps=3,noise_samples=1", "--batch_size", "1",
        "--output_path", tmp_path / "two", "--use_cache", tmp_path / "cache",
    )  # fmt: skip
    caches = [tmp_path / f"cache_rank{rank}.db" for rank in (0, 1)]
    assert "same command" in killed(*evaluate, cwd=tmp_path, when=lambda: known(caches[1]) > 2)
    before = sum(map(known, caches))
    again = python(*LAUNCH, *evaluate, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("exact_match") == 1
    (results, answers), _ = process_jobs.evaluated(str(tasks), str(model))
    found, logged = outcome(tmp_path / "two")
    assert found["results"] == results
    texts = [resps for name, rows in logged.items() if "sums" in name for _, resps in rows]
    assert texts == [resps for _, resps in answers if isinstance(resps[0][0], str)]
    # Each answer once, and in each cache by what it knows its model.
    assert before < sum(map(known, caches)) == 2 * 14 + 2 + 2

    prompts, part = tmp_path / "prompts.txt", tmp_path / "two.jsonl.part1"
    prompts.write_text("Hello\nAnother one\n" * 8)
    ask = ("generate", model, "--file", prompts, "--do-sample", "--max-new-tokens", "20", "--num-inference-steps", "3")
    ask = (*ask, "--batch-size", "1", "--out")
    two = ("-m", "l2d_framework.cli", *ask, tmp_path / "two.jsonl")
    said = killed(*two, cwd=tmp_path, when=lambda: part.exists() and part.stat().st_size > 0)
    assert "The same command goes on" in said
    again = python(*LAUNCH, *two, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert again.returncode == 0, again.stderr
    assert "Going on from" in again.stderr
    assert CliRunner().invoke(app, [*map(str, ask), str(tmp_path / "one.jsonl")]).exit_code == 0
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_missing_checkpoint_is_noticed_from_the_command_line(monkeypatch):
    for arguments in (
        ["--model", "l2d", "--tasks", "x"],
        ["run", "--model=l2d"],
        ["-M", "l2d", "--model_args", "seed=1"],
    ):
        assert lacks_checkpoint(arguments, {})
        assert not lacks_checkpoint(arguments, {"L2D_PRETRAINED": "x"})
        assert not lacks_checkpoint([*arguments, "--model_args", "pretrained=x"], {})
        assert not lacks_checkpoint([*arguments, "--config", "x.yaml"], {})
    for arguments in (["--model", "hf"], [], ["--model"], ["ls", "tasks"]):
        assert not lacks_checkpoint(arguments, {})
    monkeypatch.delenv("L2D_PRETRAINED", raising=False)
    with pytest.raises(ConfigError, match=r"pretrained=.*L2D_PRETRAINED"):
        run(["--tasks", "gsm8k"])
    result = CliRunner().invoke(app, ["eval", "--tasks", "gsm8k"])
    assert isinstance(result.exception, ConfigError)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"l2d-framework\[eval\]"):
        run(["--tasks", "gsm8k"])


def test_data_out_of_reach_name_the_folder_that_would_serve(monkeypatch, tmp_path):
    def unreachable() -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", unreachable)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"baber/piqa.*{tmp_path}/baber/piqa"):
        run(["--model", "dummy", "--tasks", "piqa"])


def test_an_unknown_task_is_answered_with_those_like_it(monkeypatch):
    def unknown() -> None:
        raise ValueError("Tasks not found: gsm9k, xqzxqz")

    # All of lm_eval's tasks take ten seconds to read.
    manager, known = lm_eval.tasks.TaskManager, str(Path(lm_eval.tasks.__file__).parent / "gsm8k")

    def few(*_: Any, **__: Any) -> Any:
        return manager(include_path=known, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", unknown)
    monkeypatch.setattr(sys, "argv", [])
    said = r"task 'gsm9k'; did you mean 'gsm8k'.*\? lm_eval knows no task 'xqzxqz'\. `lm_eval ls tasks`.*--include_path"
    with pytest.raises(ConfigError, match=said):
        run(["--model", "dummy", "--tasks", "gsm9k,xqzxqz"])


def test_lm_eval_knows_the_tasks_of_plugins_and_those_of_the_user(monkeypatch, tmp_path):
    seen: list[list[str]] = []
    asked: list[Any] = []

    def evaluate() -> None:
        seen.append(sys.argv[1:])
        lm_eval.tasks.TaskManager(include_path=str(tmp_path), metadata={})

    def before(verbosity: Any, include_path: Any, **_: Any) -> None:
        asked.append(include_path)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", before)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("L2D_PRETRAINED", "x")
    for arguments in (["--tasks", "a", "--limit", "2"], ["run", "--model", "hf"], ["ls", "tasks"], ["--help"]):
        assert CliRunner().invoke(app, ["eval", *arguments]).exception is None
    assert seen == [
        ["run", "--model", "l2d", "--tasks", "a", "--limit", "2"],
        ["run", "--model", "hf"],
        ["ls", "tasks"],
        ["--help"],
    ]
    assert asked == [[str(folder()), str(tmp_path)]] * 4
    assert lm_eval.tasks.TaskManager is before
