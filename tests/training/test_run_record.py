import io
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs

from l2d_framework.config import config_hash, parse_run
from l2d_framework.training.run import train_runs
from l2d_framework.training.run_record import environment, model_card_table


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    tiny_runs.write_base(folder / "base")
    tiny_runs.write_sums(folder / "sums.jsonl")
    run = tiny_runs.diffusion_run(folder / "base", folder / "sums.jsonl", folder / "out", max_steps=3)
    (folder / "run.json").write_text(json.dumps(run))
    train_runs([parse_run(run)])
    return folder / "out"


def test_the_card_holds_what_the_run_was_made_of(output: Path) -> None:
    card = json.loads((output / "run.json").read_text())
    run = parse_run(card["config"])
    assert card["config_hash"] == config_hash(run)
    assert card["finished"] is True
    assert card["seeds"] == {"run": 0, "order": 0}
    (source,) = card["data"]["sources"]["train"]
    assert source["sha256"]
    sizes = card["data"]["splits"]
    assert sizes["train"]["examples"] + sizes["eval"]["examples"] == 22
    assert card["hardware"]["cores"] == os.cpu_count()
    for name in ("l2d-framework", "torch", "transformers", "peft", "datasets"):
        assert card["versions"][name] == metadata.version(name)
    assert card["base_fingerprint"]
    assert 0 < card["parameters"]["trainable"] < card["parameters"]["total"]


def test_the_card_holds_what_came_out(output: Path) -> None:
    card = json.loads((output / "run.json").read_text())
    result, last = card["result"], tiny_runs.losses(output)[3]
    assert result["steps"] == 3
    assert result["losses"]["loss"] == last["loss"]
    assert result["losses"]["eval_loss"] == last["eval_loss"] == result["best_eval_loss"]
    assert any(name.startswith("eval_loss_t0") for name in result["losses"])
    assert result["tokens_per_second"] > 0
    assert result["peak_memory"] > 2**20
    assert card["seconds"] > 0
    assert card["started"] <= card["ended"]


def test_the_model_card_has_a_row_for_every_part(output: Path) -> None:
    card = json.loads((output / "run.json").read_text())
    table = model_card_table(card)
    assert table in (output / "README.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    assert all(row.count("|") == 3 for row in rows)
    for part in (
        card["config_hash"],
        f"{card['result']['losses']['eval_loss']:.4f}",
        card["hardware"]["cpu"],
        "torch ",
    ):
        assert part in table


def test_plugins_of_other_distributions_are_named_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        dist = metadata.distribution("pytest")

    monkeypatch.setattr(metadata, "entry_points", lambda group: [Point()] if group == "l2d_framework" else [])
    assert environment(1)["versions"]["pytest"] == metadata.version("pytest")


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert environment(1)["commit"] is None
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], check=True)
    sha = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert environment(1)["commit"] == sha
    (tmp_path / "file").write_text("")
    subprocess.run(["git", "add", "file"], check=True)
    assert environment(1)["commit"] == f"{sha} with local changes"


def test_a_terminal_sees_a_bar_with_loss_speed_and_remaining_time() -> None:
    from rich.console import Console

    from l2d_framework.cli.progress import progress

    screen = io.StringIO()
    bar = progress(Console(file=screen, force_terminal=True, width=120), "out")
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=4)
    bar.on_train_begin(None, state, None)
    state.global_step = 3
    bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 1.25, "eval_loss": 1.5, "tokens_per_second": 1000.0})
    bar.close()
    shown = screen.getvalue()
    for part in ("3/4", "loss 1.2500", "held out 1.5000", "1,000 tokens/s"):
        assert part in shown


def test_the_command_line_reports_a_finished_run(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from l2d_framework.cli import app

    monkeypatch.setattr(sys, "argv", ["l2d", "train", str(output.parent / "run.json")])
    with pytest.raises(SystemExit) as ended:
        app()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "loss, nats per token" in shown
    assert f"l2d generate {output}" in shown
    # It had been trained before this command.
    ended_at = json.loads((output / "run.json").read_text())["ended"]
    assert (
        f"{output} had finished before, at {ended_at}, so nothing was trained now. To begin anew, add --overwrite"
        in shown
    )
