import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from l2d_framework.config import parse_run
from l2d_framework.training.run import train_runs


@pytest.mark.parametrize("method", [tiny_runs.diffusion_run, tiny_runs.tess_run])
def test_two_processes_train_like_one(tmp_path: Path, method: Callable[..., dict[str, Any]]) -> None:
    tiny_runs.write_base(tmp_path / "base")
    tiny_runs.write_sums(tmp_path / "sums.jsonl", 14)
    run = method(tmp_path / "base", tmp_path / "sums.jsonl", tmp_path / "two", max_steps=6)
    # A schedule that hears the losses of both processes, in few knots so that it is felt.
    run["schedule"] = {"name": "information", "base": run["schedule"], "knots": 8}
    (tmp_path / "run.json").write_text(json.dumps(run))
    # Each process takes one sequence at a time: two micro-batches per update, unlike the single process below.
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    ]
    command = [*launch, "-m", "l2d_framework.cli", "train", str(tmp_path / "run.json"), "training.micro_batch_size=1"]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("Generate with:") == 1
    train_runs([parse_run(run | {"output_dir": str(tmp_path / "one")})])
    two, one = tiny_runs.losses(tmp_path / "two"), tiny_runs.losses(tmp_path / "one")
    assert two.keys() == one.keys()
    for step, expected in one.items():
        assert two[step] == pytest.approx(expected, abs=1e-5), step
    card = json.loads((tmp_path / "two" / "run.json").read_text())
    assert card["hardware"]["processes"] == 2
    assert sorted(p.name for p in (tmp_path / "two" / "checkpoint-6").glob("rng*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
