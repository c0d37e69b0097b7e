"""Run files, checkpoints and unfinished runs that earlier code wrote go on as they did (format 1: the damaged ones)."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import losses

from l2d_framework import load
from l2d_framework.config import config_hash, load_run
from l2d_framework.training.run import train_runs

FORMAT_2 = Path(__file__).parent / "data" / "format2"
"""A tiny base, sums, and of both methods a run file, what it trained, and the same run stopped after three updates."""

EXPECTED = json.loads((FORMAT_2 / "expected.json").read_text())


@pytest.fixture
def here(tmp_path, monkeypatch):
    shutil.copytree(FORMAT_2, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("kind", ["l2d", "tess"])
def test_a_run_file_means_the_run_it_meant(here, kind):
    (run,) = load_run(Path(f"{kind}.yaml"))
    run = run.model_copy(update={"output_dir": kind})
    assert config_hash(run) == EXPECTED[kind]["config_hash"]


@pytest.mark.parametrize("kind", ["l2d", "tess"])
def test_a_checkpoint_answers_as_it_did(here, kind):
    found = load(f"{kind}_whole").generate(["12+7=", "301+5="], max_new_tokens=5, seed=3)
    assert found.sequences.tolist() == EXPECTED[kind]["sequences"]
    assert found.evaluations.tolist() == EXPECTED[kind]["evaluations"]


@pytest.mark.parametrize("kind", ["l2d", "tess"])
def test_an_unfinished_run_goes_on_to_the_losses_it_would_have_had(here, kind):
    shutil.move(f"{kind}_stopped", kind)
    (run,) = load_run(Path(f"{kind}.yaml"), ["output_dir=" + kind])
    train_runs([run])
    # Twice the rounding that other kernels make in six updates.
    for step, expected in EXPECTED[kind]["losses"].items():
        assert losses(Path(kind))[int(step)] == pytest.approx(expected, rel=2e-3), step
