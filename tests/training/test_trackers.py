"""Trackers of `report_to`, each without a network; those that are not installed are skipped.

A run that was killed, and goes on, is one with that which was not.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Stop, diffusion_run, losses, write_base, write_sums

from l2d_framework.config import parse_run
from l2d_framework.training.run import train_runs

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture
def train(tmp_path):
    """Trains a small run that reports to a tracker, killed behind a checkpoint; returns its output folder."""

    def run(tracker: str, *, is_killed: bool = False) -> Path:
        base, data = write_base(tmp_path / "base"), write_sums(tmp_path / "sums.jsonl")
        run = parse_run(diffusion_run(base, data, tmp_path / "mine", report_to=[tracker]))
        if is_killed:
            with pytest.raises(KeyboardInterrupt):
                train_runs([run], callbacks=lambda _: [Stop(5)])
        train_runs([run])
        return tmp_path / "mine"

    return run


def logged(output: Path) -> dict[tuple[str, int], float]:
    """Losses of a finished run, by the name that trackers give them and the update."""
    named = {}
    for step, entry in losses(output).items():
        for name, value in entry.items():
            place = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            named[place, step] = value
    assert {"train/loss", "eval/loss", "eval/loss_t00"} <= {name for name, _ in named}
    return named


def by_step(rows: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """The same of rows that hold what was logged together."""
    return {
        (name, row["train/global_step"]): value
        for row in rows
        for name, value in row.items()
        if "loss" in name and name != "train/train_loss"
    }


def run_file(output: Path) -> Any:
    return json.loads((output / "run.json").read_text())["config"]


@pytest.mark.parametrize("is_killed", [False, True])
def test_tensorboard_gets_the_run_file_and_every_loss_once_those_by_t_included(train, is_killed):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = train("tensorboard", is_killed=is_killed)
    (folder,) = {file.parent for file in output.rglob("events.out.tfevents.*")}
    assert len(list(folder.iterdir())) == 1 + is_killed
    events = accumulator.EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "loss" in tag]
    pairs = [((tag, event.step), event.value) for tag in tags for event in events.Scalars(tag)]
    found = dict(pairs)
    assert len(found) == len(pairs)
    assert {place: found[place] for place in logged(output)} == pytest.approx(logged(output), rel=1e-5)
    (text,) = events.Tensors("args/text_summary")[0].tensor_proto.string_val
    assert json.loads(text) == run_file(output)


def test_wandb_offline_gets_the_run_file_and_every_loss_under_the_name_of_the_run(train, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    rows, runs, log = [], {}, wandb.Run.log

    def listen(run, row, **named):
        runs[run.id] = run.name, dict(run.config)
        rows.append(row)
        log(run, row, **named)

    monkeypatch.setattr(wandb.Run, "log", listen)
    output = train("wandb", is_killed=True)
    assert runs == {json.loads((output / "run.json").read_text())["wandb"]: (output.name, run_file(output))}
    assert wandb.run is None
    assert by_step(rows) == pytest.approx(logged(output))
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 2


def test_trackio_gets_every_loss_under_the_name_of_the_run(train):
    trackio = pytest.importorskip("trackio")
    output = train("trackio")
    with sqlite3.connect(Path(trackio.utils.TRACKIO_DIR) / "huggingface.db") as database:
        rows = database.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {output.name}
    assert by_step([json.loads(text) for _, text in rows]) == pytest.approx(logged(output))
