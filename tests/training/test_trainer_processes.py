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

LAUNCH = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--local-addr=127.0.0.1",
    "--nproc-per-node=2",
]


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
    command = [*LAUNCH, "-m", "l2d_framework.cli", "train", str(tmp_path / "run.json")]
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


FAULTS = """
import json, os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from l2d_framework.config import parse_run
from l2d_framework.training.learner import Denoiser
from l2d_framework.training.run import train_runs

rank, folder, runs = int(os.environ["RANK"]), Path(sys.argv[1]), json.loads(sys.argv[2])
forward = Denoiser.forward

class Fault(TrainerCallback):
    def __init__(self, name):
        self.name = name
    def on_step_begin(self, args, state, control, **kwargs):
        here = rank == 1 and state.global_step == 2
        Denoiser.forward = spoilt if here and self.name != "signal" else forward
        if here and self.name == "signal":
            os.kill(os.getpid(), signal.SIGTERM)

def spoilt(self, **batch):
    outputs = forward(self, **batch)
    # The loss of one process only, and no gradient of any.
    outputs["loss"] = outputs["loss"] + outputs["loss"].detach() * float("inf") if self.training else outputs["loss"]
    return outputs

for name, run in runs.items():
    try:
        train_runs([parse_run(run)], callbacks=lambda _: [Fault(name)])
        ended = 0
    except (Exception, KeyboardInterrupt) as error:
        ended = error.exit_code
    (folder / f"{name}_{rank}").write_text(str(ended))
"""


def test_processes_agree_on_what_is_left_out_on_divergence_and_on_a_signal_that_one_of_them_has_got(
    tmp_path: Path,
) -> None:
    base, sums = tiny_runs.write_base(tmp_path / "base"), tiny_runs.write_sums(tmp_path / "sums.jsonl", 14)
    small = {"max_steps": 4, "save_steps": None, "eval_steps": None}
    runs = {
        name: tiny_runs.diffusion_run(base, sums, tmp_path / "out" / name, **small, non_finite=what)
        for name, what in (("skip", "skip"), ("stop", "stop"), ("signal", "stop"))
    }
    (tmp_path / "faults.py").write_text(FAULTS)
    ran = subprocess.run(
        [*LAUNCH, str(tmp_path / "faults.py"), str(tmp_path), json.dumps(runs)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    ended = {name: [int((tmp_path / f"{name}_{rank}").read_text()) for rank in (0, 1)] for name in runs}
    assert ended == {"skip": [0, 0], "stop": [3, 3], "signal": [143, 143]}
    out = tmp_path / "out"
    assert json.loads((out / "skip" / "run.json").read_text())["result"]["skipped_updates"] == 1
    assert {path.name for path in (out / "stop" / "diverged").iterdir()} == {
        *("batches_0.pt", "batches_1.pt", "checkpoint-2", "what.txt")
    }
    assert [path.name for path in out.glob("signal/checkpoint-*")] == ["checkpoint-3"]
