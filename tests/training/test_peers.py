import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
from torch.distributed import HashStore

from l2d_framework.errors import OutputError
from l2d_framework.training.peers import Peers


def watching(store: HashStore, rank: int, heard: list[str]) -> Peers:
    return Peers(store, rank, poll=0.01, grace=0.05, end=heard.append)


def until(heard: list[str], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not heard and time.monotonic() < end:
        time.sleep(0.01)


def test_a_process_that_fails_alone_ends_the_others_saying_why():
    store, own, others = HashStore(), list[str](), list[str]()
    with watching(store, 1, others):
        with pytest.raises(OutputError), watching(store, 0, own):
            raise OutputError("The disk is full.")
        until(others)
    (text,) = others
    assert text.startswith("Process 0 of the run has failed: The disk is full. Process 1 cannot go on")
    assert not own


def test_processes_that_fail_alike_or_come_to_an_end_are_left_alone():
    store, heard = HashStore(), list[str]()
    with watching(store, 1, heard), watching(store, 0, heard):
        pass
    for rank in (0, 1):
        with pytest.raises(KeyboardInterrupt), watching(store, rank, heard):
            raise KeyboardInterrupt
    until(heard, 0.2)
    assert not heard


FAILS = """
import json, sys, time
from pathlib import Path
from l2d_framework.config import parse_run
from l2d_framework.errors import OutputError
from l2d_framework.training import trainer
from l2d_framework.training.run import train_runs

def full(folder):
    raise OutputError("The disk is full.")

trainer.seal = full  # which only the first process calls
try:
    train_runs([parse_run(json.loads(Path(sys.argv[1]).read_text()))])
except OutputError:
    time.sleep(600)  # its connections stay open, as those of a GPU's library do
"""


@pytest.mark.slow
def test_a_process_that_waits_for_one_that_could_not_write_ends_in_bounded_time(tmp_path: Path) -> None:
    base, sums = tiny_runs.write_base(tmp_path / "base"), tiny_runs.write_sums(tmp_path / "sums.jsonl", 14)
    run = tiny_runs.diffusion_run(base, sums, tmp_path / "out", max_steps=2, save_steps=1, eval_steps=None)
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "fails.py").write_text(FAILS)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    first, second = (
        subprocess.Popen(
            [sys.executable, str(tmp_path / "fails.py"), str(tmp_path / "run.json")],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    )
    try:
        said = second.communicate(timeout=240)[1]
    finally:
        first.kill()
        first.communicate()
    assert second.returncode == 1
    assert "Process 0 of the run has failed: The disk is full. Process 1 cannot go on without it" in said


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
