import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from l2d_framework.config import parse_run
from l2d_framework.training.run import train_runs


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    base, sums = tiny_runs.write_base(tmp_path / "base"), tiny_runs.write_sums(tmp_path / "sums.jsonl", 14)
    methods = {"l2d": tiny_runs.diffusion_run, "tess": tiny_runs.tess_run}

    def stages(kind: str, **training: Any) -> dict[str, dict[str, Any]]:
        runs = {
            name: method(base, sums, tmp_path / kind / name, max_steps=6, **training)
            for name, method in methods.items()
        }
        # A schedule that hears the losses of both processes, in few knots so that it is felt.
        runs["l2d"]["schedule"] = {"name": "information", "base": runs["l2d"]["schedule"], "knots": 8}
        return runs

    # Each process takes one sequence at a time: two micro-batches per update, unlike the single process below.
    fields = {"stages": list(stages("two", micro_batch_size=1).values())}
    (tmp_path / "run.json").write_text(json.dumps(fields))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    ]
    command = [*launch, "-m", "l2d_framework.cli", "train", str(tmp_path / "run.json")]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("Generate with:") == len(methods)
    for name, run in stages("one").items():
        train_runs([parse_run(run)])
        two, one = tiny_runs.losses(tmp_path / "two" / name), tiny_runs.losses(tmp_path / "one" / name)
        assert two.keys() == one.keys()
        for step, expected in one.items():
            assert two[step] == pytest.approx(expected, abs=1e-5), (name, step)
        card = json.loads((tmp_path / "two" / name / "run.json").read_text())
        assert card["hardware"]["processes"] == 2
        assert sorted(p.name for p in (tmp_path / "two" / name / "checkpoint-6").glob("rng*")) == [
            "rng_state_0.pth",
            "rng_state_1.pth",
        ]
    two, one = (load_file(tmp_path / kind / "l2d" / "diffusion.safetensors") for kind in ("two", "one"))
    heard = one["schedule._extra_state"]
    assert heard.any()
    torch.testing.assert_close(two["schedule._extra_state"], heard, rtol=1e-4, atol=1e-4)
