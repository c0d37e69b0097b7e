"""DeepSpeed's shares, where it is installed: two processes that go wrong, stop and go on."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import process_jobs
import pytest
import tiny_runs

from l2d_framework.config import TrainingSection, parse_run
from l2d_framework.errors import ConfigError
from l2d_framework.training import zero
from l2d_framework.training.run import train_runs

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]


def test_only_the_frameworks_below_do_not_see_what_the_launcher_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with zero.unseen():
        assert not zero.is_asked_for()
    assert zero.is_asked_for()
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    with zero.unseen():
        pass
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


@pytest.mark.parametrize("found", ["", "0.18.4", "0.20.0"])
def test_a_deepspeed_that_is_missing_or_was_not_tried_is_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    def version(_: str) -> str:
        if not found:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(zero, "version", version)
    message = f"of which {found or 'nothing'} is installed. Install 'deepspeed.*', or launch with FSDP2"
    with pytest.raises(ConfigError, match=message):
        zero.check(TrainingSection())
    monkeypatch.setattr(zero, "version", lambda _: "0.19.8")
    zero.check(TrainingSection())
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1")
    zero.check(TrainingSection(max_grad_norm=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2"])
def test_processes_leave_out_stop_and_go_on_whatever_the_layout_before_and_after(tmp_path: Path, stage: str) -> None:
    pytest.importorskip("deepspeed")
    base, sums = tiny_runs.write_base(tmp_path / "base"), tiny_runs.write_sums(tmp_path / "sums.jsonl", 14)

    def run(name: str, **training: Any) -> dict[str, Any]:
        quick = {"max_steps": 4, "save_steps": None, "eval_steps": None, **training}
        return tiny_runs.diffusion_run(base, sums, tmp_path / name, **quick)

    train_runs([parse_run(run("one"))])
    begun = run("begun", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train_runs([parse_run(begun)], callbacks=lambda _: [tiny_runs.Stop(2)])
    faults = {"skip": run("skip", non_finite="skip"), "stop": run("stop"), "signal": run("signal")}
    (tmp_path / "jobs.json").write_text(json.dumps({"faults": faults, "plain": [begun]}))
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    ran = subprocess.run(
        [*LAUNCH, str(process_jobs.__file__), str(tmp_path / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1", **asked},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    ended = {name: [int((tmp_path / f"{name}_{rank}").read_text()) for rank in (0, 1)] for name in faults}
    assert ended == {"skip": [0, 0], "stop": [3, 3], "signal": [143, 143]}
    assert json.loads((tmp_path / "skip" / "run.json").read_text())["result"]["skipped_updates"] == 1
    own = [int((tmp_path / f"moments_{rank}").read_text()) for rank in (0, 1)]
    trained = json.loads((tmp_path / "begun" / "run.json").read_text())["parameters"]["trainable"]
    assert trained <= sum(own) <= trained + 32 and max(own) < 0.6 * trained  # filled up so that they are equal
    train_runs([parse_run(faults["signal"])])  # in one process
    wanted = tiny_runs.losses(tmp_path / "one")
    for name in ("begun", "signal"):
        found = tiny_runs.losses(tmp_path / name)
        assert found.keys() == wanted.keys()
        for step, expected in wanted.items():
            assert found[step] == pytest.approx(expected, rel=1e-5), (name, step)
