"""What may go wrong while a run trains loses nothing and is said in this package's words, whatever is trained."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from forks import Fork
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from transformers import TrainerCallback

from l2d_framework import opening
from l2d_framework.base_model import fetch
from l2d_framework.cli import main
from l2d_framework.config import RewardRun, parse_run
from l2d_framework.errors import (
    EXIT_CODES,
    BusyError,
    CheckpointError,
    DataError,
    DivergedError,
    Interrupted,
    L2DError,
    OutputError,
)
from l2d_framework.models.unloaded import UnloadedModel
from l2d_framework.training import folder_lock, interruption, output_dir, trainer
from l2d_framework.training.interruption import Interruption
from l2d_framework.training.reward.run import train_reward
from l2d_framework.training.run import train_runs
from l2d_framework.training.token_trainer import TokenTrainer
from l2d_framework.writing import staged

ALL = ["l2d", "reward", "tess", "full", "lora"]
KINDS = ["l2d", "reward", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ALL[2:])]
"""The others are trained by the trainer of the first."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_runs.write_base(tmp_path / "base")
    tiny_runs.write_sums(tmp_path / "sums.jsonl", 14)
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def fields(folder: Path, kind: str, name: str = "out", **training: Any) -> dict[str, Any]:
    base, data, output = folder / "base", folder / "sums.jsonl", folder / name
    training = {"max_steps": 6, "eval_steps": None, "save_steps": 2, **training}
    if kind == "l2d":
        return tiny_runs.diffusion_run(base, data, output, **training)
    if kind == "tess":
        return tiny_runs.tess_run(base, data, output, **training)
    if kind == "reward":
        settings = {"batch_size": 4, "micro_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}
        return {
            "kind": "reward",
            "model": {"base": str(base)},
            "data": {"train": [{"path": str(folder / "pairs.jsonl")}], "max_length": 64},
            "training": {**settings, **training},
            "output_dir": str(output),
        }
    lora = {"lora": {"rank": 2, "alpha": 2.0, "targets": "all-linear"}} if kind == "lora" else {}
    return tiny_runs.language_model_run(data, output, model={"base": str(base)}, training=training, **lora)


def train(run: dict[str, Any], *callbacks: TrainerCallback, **options: bool) -> dict[str, Any]:
    parsed = parse_run(run)
    if isinstance(parsed, RewardRun):
        return train_reward(parsed, callbacks=callbacks, **options)
    return train_runs([parsed], callbacks=lambda _: callbacks, **options)[0]


def stop(run: dict[str, Any], step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(run, tiny_runs.Stop(step))


def weights(output: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(output.glob("*.safetensors")) + sorted(output.glob("*/*.safetensors")):
        if not path.parent.name.startswith(("checkpoint", "best")):
            found |= {f"{path.name}:{name}": value for name, value in load_file(path).items()}
    assert found
    return found


def assert_same(output: Path, other: Path) -> None:
    ours, theirs = weights(output), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# Changed inputs


@pytest.mark.parametrize("kind", KINDS)
def test_changed_data_stop_a_run_that_goes_on_and_are_recorded_where_they_are_accepted(folder: Path, kind: str) -> None:
    run = fields(folder, kind)
    stop(run, 3)
    data = Path(run["data"]["train"][0]["path"])
    before = data.read_text()
    data.write_text("".join(reversed(before.splitlines(keepends=True))))
    with pytest.raises(DataError, match=rf"data\.train\.0, '{data}', has sha256 \w+ there.*--accept-changed-data"):
        train(run)
    with pytest.raises(KeyboardInterrupt):
        train(run, tiny_runs.Stop(5), accept_changed_data=True)
    card = train(run)  # the changed data are this run's from now on
    (change,) = card["accepted_changes"]
    assert change["after"] == "checkpoint-2"
    assert change["data_before"]["sources"]["train"][0]["sha256"] != card["data"]["sources"]["train"][0]["sha256"]


def test_data_may_change_before_anything_was_saved(folder: Path) -> None:
    run = fields(folder, "l2d")
    stop(run, 1)
    tiny_runs.write_sums(folder / "sums.jsonl", 18)
    assert train(run)["finished"]


def test_the_end_of_a_streamed_file_is_looked_at(folder: Path) -> None:
    tiny_runs.write_sums(folder / "sums.jsonl", 1500)
    run = fields(folder, "l2d")
    run["data"] |= {"streaming": True, "eval_fraction": 0.0}
    stop(run, 3)
    with (folder / "sums.jsonl").open("a") as file:
        file.write('{"prompt": "1+1=", "completion": "2", "kind": "odd"}\n')
    with pytest.raises(DataError, match="sha256_of_ends"):
        train(run)


def test_other_tokens_of_the_same_data_stop_a_run_that_goes_on(folder: Path) -> None:
    run = fields(folder, "full")
    stop(run, 3)
    card = json.loads((folder / "out" / "run.json").read_text())
    card["data"]["splits"]["train"]["tokens"] += 1
    (folder / "out" / "run.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match="the tokenizer, a chat template or this package has changed"):
        train(run)


def test_another_base_model_in_the_same_place_is_refused(folder: Path) -> None:
    run = fields(folder, "l2d")
    stop(run, 3)
    path = folder / "base" / "model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.base has fingerprint"):
        train(run)


# Divergence


class Spoil(TrainerCallback):
    """Makes a weight no number before updates begin, and gives it back its value after those that were left out."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weight = next(p for p in reversed(list(model.parameters())) if p.requires_grad)
        if state.global_step in self.steps:
            self.value = self.weight.detach().clone()
            self.weight.data.fill_(float("nan"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step - 1 in self.steps:
            self.weight.data.copy_(self.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_diverges_publishes_nothing_and_shows_what_its_last_update_began_with(
    folder: Path, kind: str
) -> None:
    run = fields(folder, kind, max_steps=5)
    with pytest.raises(DivergedError, match=r"Update 4: loss nan, gradient norm nan.*checkpoint-2.*diverged") as found:
        train(run, Spoil(3))
    assert found.value.exit_code == 3
    output = folder / "out"
    assert not json.loads((output / "run.json").read_text())["finished"]
    assert not list(output.glob("*.safetensors"))
    assert output_dir.damage(output / "diverged" / "checkpoint-3") is None
    batches = torch.load(output / "diverged" / "batches_0.pt", weights_only=True)
    assert sum(len(value) for batch in batches for name, value in batch.items() if "ids" in name) >= 4
    # Without the fault it goes on from the last good checkpoint as if nothing had been.
    train(run)
    train(fields(folder, kind, "whole", max_steps=5))
    assert_same(output, folder / "whole")


def test_what_a_diverged_update_began_with_diverges_again(folder: Path) -> None:
    run = fields(folder, "lora", learning_rate=1e30, final_learning_rate=1e30, warmup_steps=0, save_steps=None)
    with pytest.raises(DivergedError) as first:
        train(run)
    shown = folder / "out" / "diverged"
    (state,) = shown.glob("checkpoint-*")
    shutil.copytree(state, folder / "out" / state.name)
    with pytest.raises(DivergedError) as second:
        train(run)
    assert str(second.value).split(" It has")[0] == str(first.value).split(" It has")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_is_left_out_changes_no_weight_and_no_moment(folder: Path, kind: str) -> None:
    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.states: list[Any] = []

        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
            moments = [v.clone() for s in inner.state_dict()["state"].values() for v in s.values()]
            values = [p.detach().clone() for group in inner.param_groups for p in group["params"]]
            self.states.append(values + moments)

    watch = Watch()
    card = train(
        fields(folder, kind, max_steps=4, non_finite="skip", save_steps=None, logging_steps=2), Spoil(2), watch
    )
    first, second, third, fourth = watch.states
    assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(third, fourth, strict=True))
    assert card["finished"]
    logs = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["loss"] for entry in logs if "loss" in entry}
    assert [entry.get("skipped_updates") for entry in logs if "loss" in entry] == [None, 1]
    # A mean over one update that counted, not half of it.
    assert losses[4] > 0.6 * losses[2]


def test_a_run_that_leaves_out_too_many_updates_in_a_row_stops(folder: Path) -> None:
    run = fields(folder, "l2d", max_steps=9, non_finite="skip", skip_limit=2)
    with pytest.raises(DivergedError, match=r"Update 6: loss nan.*the 3th in a row, and training\.skip_limit is 2"):
        train(run, Spoil(0, 1, 3, 4, 5))


def test_how_a_run_treats_divergence_may_change_while_it_is_on_its_way(folder: Path) -> None:
    with pytest.raises(DivergedError):
        train(fields(folder, "l2d"), Spoil(3))
    assert train(fields(folder, "l2d", non_finite="skip"), Spoil(3))["result"]["skipped_updates"] == 1


class Overflow(TrainerCallback):
    """Makes a weight no number when an update has ended."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))


@pytest.mark.parametrize("kind", ["l2d", "reward"])
@pytest.mark.parametrize("save_steps", [None, 1])
def test_weights_that_are_no_numbers_are_neither_saved_nor_published(
    folder: Path, kind: str, save_steps: int | None
) -> None:
    run = fields(folder, kind, max_steps=3, save_steps=save_steps)
    run["data"]["eval_fraction"] = 0.0
    with pytest.raises(DivergedError, match="After update 3 a weight is infinite or no number"):
        train(run, Overflow(3))
    assert not list((folder / "out").glob("*.safetensors"))
    names = [path.name for path in output_dir.checkpoints(folder / "out")]
    assert names == (["checkpoint-1", "checkpoint-2"] if save_steps else [])


def test_a_held_out_loss_that_is_no_number_stops_a_run_before_it_is_the_best(folder: Path) -> None:
    with pytest.raises(DivergedError, match="After update 2 the held-out loss is nan"):
        train(fields(folder, "full", eval_steps=2, save_steps=None), Overflow(2))
    assert not (folder / "out" / "best").exists()


# Locks


HOLD = """
import sys, time
from pathlib import Path
from l2d_framework.training.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(folder: Path, name: str) -> Iterator[BaseProcess]:
    """A process that holds the output folder of this name."""
    with Fork(folder, HOLD, folder / name) as fork:
        fork.prints("held")
        yield fork.process


def test_a_folder_in_which_another_process_trains_is_refused_by_name_and_free_once_that_is_dead(folder: Path) -> None:
    runs = [fields(folder, kind, max_steps=1) for kind in ("full", "reward")]
    with holder(folder, "out") as process:
        for run in runs:
            for overwrite in (False, True):
                text = rf"in use by process {process.pid} on '{socket.gethostname()}', since 20\d\d-"
                with pytest.raises(BusyError, match=text):
                    train(run, overwrite=overwrite)
        process.kill()  # it cannot take back its lock
        process.join()
    assert (folder / "out" / folder_lock.HOLDER).is_file()
    assert train(runs[0])["finished"]
    assert not folder_lock.FILES & {path.name for path in (folder / "out").iterdir()}


@pytest.mark.parametrize("is_child", [False, True], ids=["its own", "of its child"])
def test_a_lock_that_children_of_a_dead_process_still_hold_is_waited_for(folder: Path, is_child: bool) -> None:
    # As older releases of filelock leave it to forked workers.
    source = "import fcntl, sys, time; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX); print(); time.sleep(1)"
    output = folder / "out"
    output.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    command = [sys.executable, "-c", source, str(output / folder_lock.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        pids = {"pid": child.pid, "parent": dead.pid} if is_child else {"pid": dead.pid, "parent": None}
        facts = {**pids, "host": socket.gethostname(), "since": "now"}
        (output / folder_lock.HOLDER).write_text(json.dumps(facts))
        with folder_lock.locked(output):
            assert child.wait() == 0


def test_what_stands_above_a_folder_in_use_is_not_moved_aside(folder: Path) -> None:
    with holder(folder, "demo/l2d") as process:
        with pytest.raises(BusyError, match=str(process.pid)):
            output_dir.move_aside(folder / "demo")
        assert (folder / "demo" / "l2d" / folder_lock.LOCK).is_file()
        process.kill()
        process.join()
    assert output_dir.move_aside(folder / "demo") == folder / "demo.old-1"
    assert not list((folder / "demo.old-1").rglob("*lock*"))


def test_an_error_gives_the_folder_free_and_leaves_nothing_where_nothing_was_written(folder: Path) -> None:
    run = fields(folder, "l2d")
    (folder / "sums.jsonl").write_text("{")
    with pytest.raises(DataError):
        train(run)
    assert not (folder / "out").exists()
    tiny_runs.write_sums(folder / "sums.jsonl", 14)
    assert train(run | {"training": run["training"] | {"max_steps": 1}})["finished"]


def test_overwriting_moves_a_folder_aside_without_its_lock(folder: Path) -> None:
    train(fields(folder, "full", max_steps=1))
    train(fields(folder, "full", max_steps=2), overwrite=True)
    for name in ("out", "out.old-1"):
        assert not folder_lock.FILES & {path.name for path in (folder / name).iterdir()}


# Damaged checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(
    folder: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(fields(folder, kind, "whole"))
    run = fields(folder, kind)
    stop(run, 5)
    newest = folder / "out" / "checkpoint-4"
    files = [path for path in newest.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        found = output_dir.newest_whole(folder / "out", lambda _: None)
        path.write_bytes(content)
        assert found == folder / "out" / "checkpoint-2", path
    (newest / "optimizer.pt").write_bytes(b"half")
    caplog.clear()
    train(run)
    assert f"'{newest}' is damaged: 'optimizer.pt' is truncated or changed." in caplog.text
    assert_same(folder / "out", folder / "whole")


def test_without_a_whole_checkpoint_a_run_is_refused_and_one_that_was_passed_over_pushes_none_out(folder: Path) -> None:
    run = fields(folder, "l2d", save_total_limit=1, max_steps=8)
    stop(run, 5)
    output = folder / "out"
    (output / "checkpoint-4").rename(output / "checkpoint-7")  # of a moment at which none will be written
    (output / "checkpoint-7" / "trainer_state.json").rename(output / "state.json")
    with pytest.raises(CheckpointError, match=r"No checkpoint is whole.*'trainer_state\.json' is missing.*--overwrite"):
        train(run)
    shutil.copytree(output / "checkpoint-7", output / "checkpoint-4")
    (output / "state.json").rename(output / "checkpoint-4" / "trainer_state.json")
    # What is said to be whole is.
    room = pytest.raises(OutputError, match=r"checkpoint-4, which takes .*, is whole")
    with room, output_dir.writing(output / "x", output / "x.writing"):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(DivergedError, match=r"The last checkpoint is '.*checkpoint-4'"):
        train(run, Spoil(4))
    stop(run, 7)
    assert [path.name for path in output_dir.checkpoints(output)] == ["checkpoint-6", "checkpoint-7"]
    train(run)
    assert [path.name for path in output_dir.checkpoints(output)] == ["checkpoint-8"]


def test_a_checkpoint_from_before_there_were_hashes_resumes(folder: Path) -> None:
    train(fields(folder, "tess", "whole"))
    run = fields(folder, "tess")
    stop(run, 3)
    (folder / "out" / "checkpoint-2" / output_dir.SEAL).unlink()
    train(run)
    assert_same(folder / "out", folder / "whole")


# Full disks


@pytest.fixture
def disk() -> Iterator[None]:
    """A disk that may run full, and has room again in the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Fill(TrainerCallback):
    """When an update begins, lets no file be larger than `size`: a disk that runs full in the middle of one."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, before[1]))


@pytest.mark.parametrize(
    ("kind", "file"), [*((kind, "optimizer.pt") for kind in ("l2d", "reward")), ("l2d", "weights")]
)
def test_a_disk_that_is_full_while_saving_loses_nothing_and_is_said(
    disk: None, folder: Path, kind: str, file: str
) -> None:
    run = fields(folder, kind)
    stop(run, 3)
    saved = folder / "out" / "checkpoint-2"
    paths = list(saved.rglob("*.safetensors")) if file == "weights" else [saved / file]
    size = max(path.stat().st_size for path in paths) - 100
    text = r"checkpoint-4' could not be written: File too large.*checkpoint-2, which takes \d+ KiB, is whole"
    with pytest.raises(OutputError, match=text):
        train(run, Fill(3, size))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert [path.name for path in output_dir.checkpoints(folder / "out")] == ["checkpoint-2"]
    assert not list((folder / "out").glob("*.writing"))
    train(run)
    train(fields(folder, kind, "whole"))
    assert_same(folder / "out", folder / "whole")


@pytest.mark.parametrize("kind", ["l2d", "reward"])
def test_a_disk_without_room_for_a_checkpoint_is_refused_and_one_for_few_is_warned_of(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = fields(folder, kind, max_steps=2)
    usage = shutil.disk_usage(folder)
    card = train(fields(folder, kind, "roomy", max_steps=2))
    assert "save_total_limit" not in caplog.text
    size = 12 * card["parameters"]["trainable"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(OutputError, match=r"A checkpoint takes about .* free for '.*out'\. Make room"):
        train(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size + 1))
    assert train(run)["finished"]
    assert "training.save_total_limit 2 and the finished model need" in caplog.text
    saved = output_dir.size_of(folder / "out" / "checkpoint-2")
    assert 0.3 < size / saved < 1.1  # the model is tiny beside its tokenizer


def test_other_errors_while_saving_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    for error in (RuntimeError("CUDA error"), OSError(errno.ENOENT, "No such file"), ValueError("x")):
        with pytest.raises(type(error), match=str(error)[:5].replace("[", r"\[")), staged(tmp_path / "out"):
            raise error


# Signals


class Signal(TrainerCallback):
    """Sends this process signals in the middle of an update."""

    def __init__(self, step: int, *signums: int) -> None:
        self.step, self.signums = step, signums

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for signum in self.signums:
                os.kill(os.getpid(), signum)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_saves_at_the_end_of_the_update_and_the_run_goes_on_as_if_nothing_had_been(
    folder: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    run = fields(folder, kind, save_steps=None, logging_steps=2)
    names = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}
    for step, (signum, name) in enumerate(names.items(), 1):
        with pytest.raises(
            Interrupted, match=f"{name} after update {step + 1} of 6: saved .*checkpoint-{step + 1}'"
        ) as stopped:
            train(run, Signal(step, signum))
        assert stopped.value.exit_code == 128 + signum
        assert f"{name}: saving when this update has ended" in capfd.readouterr().err
    assert [signal.getsignal(n) for n in names] == before
    train(run)
    train(fields(folder, kind, "whole", save_steps=None, logging_steps=2))
    assert_same(folder / "out", folder / "whole")


@pytest.mark.parametrize("what", ["measuring", "writing"])
def test_after_the_update_a_signal_waits_for_what_is_measured_and_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(interruption, "GRACE", 0.5)
    monkeypatch.setattr(Interruption, "_end", lambda self: killed.append(self.signum))
    evaluate, seal = TokenTrainer.evaluate, trainer.seal

    def measured(self: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(1.0)
        return evaluate(self, *arguments, **options)

    def sealed(path: Path) -> None:
        if what == "writing" and path.name.startswith("checkpoint-3"):
            os.kill(os.getpid(), signal.SIGTERM)  # it waits for one more update, and is not killed meanwhile
            time.sleep(1.0)
        seal(path)

    monkeypatch.setattr(TokenTrainer, "evaluate", measured)
    monkeypatch.setattr(trainer, "seal", sealed)
    every = {"eval_steps": 3, "save_steps": None} if what == "measuring" else {"save_steps": 3}
    with pytest.raises(Interrupted, match="saved"):
        train(fields(folder, "l2d", **every), *([Signal(2, signal.SIGTERM)] if what == "measuring" else []))
    assert killed == []
    assert output_dir.damage(output_dir.checkpoints(folder / "out")[-1]) is None


def test_an_update_that_does_not_end_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = threading.Event()
    monkeypatch.setattr(interruption, "GRACE", 0.05)
    monkeypatch.setattr(Interruption, "_end", lambda self: killed.set())
    for is_during in (True, False):
        killed.clear()
        with Interruption() as heard:
            if is_during:
                heard.begins()
            os.kill(os.getpid(), signal.SIGTERM)
            assert killed.wait(0.5) == is_during
            if not is_during:
                heard.begins()  # the last one
                assert killed.wait(5)


def test_only_a_second_ctrl_c_ends_at_once(folder: Path) -> None:
    run = fields(folder, "l2d", save_steps=None)
    with pytest.raises(Interrupted):
        train(run, Signal(2, signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
    assert output_dir.checkpoints(folder / "out") == []
    with pytest.raises(Interrupted, match="checkpoint-3"):
        train(run, Signal(2, signal.SIGINT, signal.SIGTERM, signal.SIGTERM))


# One call of C, as a backward pass is, in which the signals come; Python runs no handler before it has ended.
LONG_CALL = """
import ctypes, os, time
from l2d_framework.training import interruption

libc = ctypes.CDLL(None)
libc.popen.restype, libc.pclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
interruption.GRACE = interruption.PATIENCE = 0.1
with interruption.Interruption() as heard:
    if {is_updating}:
        heard.begins()
    child = os.fork()
    if child == 0:  # a worker that loads data hears Ctrl-C, too
        os.kill(os.getpid(), {signum})
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.3)
    assert os.path.getsize("errors") == 0
    libc.pclose(libc.popen({shell!r}.encode(), b"r"))
    print("heard", heard.signum, flush=True)
"""
SAID = (
    "for i in $(seq 400); do grep -q saving errors && break; sleep 0.05; done; grep -q saving errors || kill -9 $PPID"
)


@pytest.mark.parametrize(
    ("signum", "is_updating", "shell", "code", "said"),
    [
        (signal.SIGTERM, False, f"kill -15 $PPID; {SAID}", 0, "SIGTERM: saving when this update has ended."),
        (signal.SIGTERM, True, "kill -15 $PPID; sleep 20", 143, "has not ended within 0 s"),
        (signal.SIGINT, False, f"kill -2 $PPID; {SAID}; kill -2 $PPID; sleep 20", 130, "ended at once"),
    ],
)
def test_a_signal_is_answered_at_once_while_one_call_takes_long(
    tmp_path: Path, signum: int, is_updating: bool, shell: str, code: int, said: str
) -> None:
    program = LONG_CALL.format(signum=int(signum), is_updating=is_updating, shell=f"sleep 0.3; {shell}")
    with (tmp_path / "errors").open("w") as errors:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, timeout=50
        )
    told = (tmp_path / "errors").read_text()
    assert done.returncode == code, told
    assert said in told and told.count("saving") == 1
    assert done.stdout == (b"heard 15\n" if code == 0 else b"")


def test_signals_that_somebody_else_listens_to_and_threads_are_left_alone(folder: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: heard.append(signum))
    try:
        assert train(fields(folder, "l2d", max_steps=2), Signal(1, signal.SIGUSR1))["finished"]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    cards: list[Any] = []
    thread = threading.Thread(target=lambda: cards.append(train(fields(folder, "l2d", "thread", max_steps=2))))
    thread.start()
    thread.join()
    assert cards[0]["finished"]


PROGRAM = """
import os, sys, time
from transformers import TrainerCallback
from l2d_framework.cli import main
from l2d_framework.training import interruption
import l2d_framework.cli.progress as progress

class Wait(progress.Reporter):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            print("waiting", flush=True)
            time.sleep(float(os.environ["WAIT"]))
    on_log = lambda *_, **__: None

progress.progress = lambda console, title: Wait(title)
interruption.GRACE = float(os.environ["GRACE"])
main()
"""


@pytest.mark.parametrize(
    ("command", "kind", "signum", "wait", "code"),
    [
        ("train", "l2d", signal.SIGTERM, 0.5, 143),
        pytest.param("train-reward", "reward", signal.SIGUSR1, 0.5, 138, marks=pytest.mark.slow),
        pytest.param("demo", "", signal.SIGINT, 0.5, 130, marks=pytest.mark.slow),
        ("train", "l2d", signal.SIGTERM, 60, 143),
    ],
)
def test_the_command_line_ends_with_the_code_of_the_signal_and_says_how_to_go_on(
    folder: Path, command: str, kind: str, signum: int, wait: float, code: int
) -> None:
    arguments = ["--quick", "--out", str(folder / "out")]
    if kind:
        (folder / "run.json").write_text(json.dumps(fields(folder, kind, save_steps=None)))
        arguments = [str(folder / "run.json")]
    environ = {"WAIT": str(wait), "GRACE": "1" if wait > 1 else "60"}
    with Fork(folder, PROGRAM, command, *arguments, **environ) as fork:
        fork.prints("waiting")
        os.kill(fork.process.pid or 0, signum)
        ended, (_, errors) = fork.ended(), fork.printed()
    assert ended == code, errors
    assert "Traceback" not in errors
    saved = [path.name for path in sorted((folder / "out").rglob("checkpoint-*"))]
    if wait > 1:
        assert "The update has not ended within 1 s" in errors
        assert saved == []
    else:
        assert "checkpoint-3'; the same command goes on from there." in errors
        assert saved == ["checkpoint-3"]


# Exit codes


def test_the_pages_show_every_exit_code_and_every_error_has_one_of_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\d+)` \| (.+) \|$", page, re.MULTILINE)
    assert {int(code): text for code, text in rows} == EXIT_CODES
    kinds = [L2DError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    codes = {kind.exit_code for kind in kinds[1:]}
    codes |= {Interrupted(n).exit_code for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    assert codes == EXIT_CODES.keys() - {0, 1}


@pytest.mark.parametrize("error", [DivergedError, OutputError, BusyError, CheckpointError, Interrupted])
def test_the_command_line_ends_with_the_code_of_the_error(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: Any = Interrupted(signal.SIGTERM, "what is wrong") if error is Interrupted else error("what is wrong")

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("l2d_framework.config.load_run", fail)
    monkeypatch.setattr(sys, "argv", ["l2d", "train", "run.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == raised.exit_code
    assert "what is wrong" in capsys.readouterr().err


# Kills


class Kills:
    """Ends whatever changes the names of files at the change of some number, counted from 1, like a kill."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        for name in ("link", "replace", "rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._killing(getattr(os, name)))

    def _killing(self, change: Any) -> Any:
        def changed(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        return changed


def files_of(folder: Path) -> dict[str, str]:
    """Contents of a model's files by name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != output_dir.RUN_FILE]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


@pytest.mark.parametrize("links", [True, False])
def test_a_publication_that_is_killed_at_any_file_shows_the_old_model_or_the_new_one_or_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def link(*_: Any) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    kills = Kills(monkeypatch)
    names = ["a.safetensors", "b.safetensors", "config.json", "language_model/config.json", "z.txt"]
    old, new = (dict.fromkeys(names, text) for text in ("old", "new"))
    seen, ended = set(), False
    for number in range(1, 100):
        output = tmp_path / str(number)
        for folder, text in ((output, "old"), (output / "final.writing", "new")):
            (folder / "language_model").mkdir(parents=True)
            for name in names:
                (folder / name).write_text(text)
        (output / "language_model" / "model-00001-of-00002.safetensors").write_text("old")
        output_dir.write_card(output, {"config": {}, "finished": False})
        kills.left = number
        try:
            output_dir.publish(output / "final.writing", output, {"config": {}, "finished": True})
            ended = kills.left > 0
        except KeyboardInterrupt:
            kills.left = 0
        whole = output / opening.PUBLISHING
        if whole.is_dir():
            assert files_of(whole) == new
            for name in (".", "language_model"):
                with pytest.raises(CheckpointError, match=rf"is half published.*{(whole / name).resolve()}'"):
                    fetch(str(output / name))
            # Others, too, see no files of both.
            others = {name: path for name, path in files_of(output).items() if name in names}
            assert "config.json" not in others or others in (old, new)
            kills.left = number % 7  # a second kill, of what completes it
            with suppress(KeyboardInterrupt):
                output_dir.complete(output)
            kills.left = 0
            output_dir.complete(output)
            output_dir.clean_up(output)
            assert files_of(output) == new
            seen.add("completed")
        else:
            found = {name: text for name, text in files_of(fetch(str(output))).items() if name in names}
            assert found in (old, new)
            seen.add(found["z.txt"])
        is_finished = (output_dir.read_card(output) or {})["finished"]
        assert not is_finished or files_of(output) == new
        if ended:
            break
    assert ended and is_finished
    assert seen == {"old", "completed", "new"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_run_that_is_killed_between_two_files_of_its_model_is_completed_by_the_same_command(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(fields(folder, kind, max_steps=2))
    longer = fields(folder, kind, max_steps=4)
    put, files = output_dir._put, []

    def stop_at_second(*arguments: Path) -> None:
        files.append(arguments)
        if len(files) == 2:
            raise KeyboardInterrupt
        put(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(output_dir, "_put", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            train(longer)
    output = folder / "out"
    new = weights(output / opening.PUBLISHING)
    above = fields(folder, "full", "above") | {"model": {"base": str(output)}}
    with pytest.raises(L2DError, match="half published"):
        train(above)
    with pytest.raises(L2DError, match="half published"):
        UnloadedModel(str(output))
    card = train(longer, tiny_runs.Stop(0))
    assert (card["finished"], card["sessions"]) == (True, 2)
    assert not (output / opening.PUBLISHING).exists()
    assert weights(output).keys() == new.keys()
    assert all(torch.equal(value, new[name]) for name, value in weights(output).items())


def test_a_disk_that_is_full_while_publishing_loses_nothing_and_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fields(folder, "full", max_steps=2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr(shutil, "copy2", full)
        with pytest.raises(OutputError, match=r"No space left.* the model is whole, and the same command goes on"):
            train(run)
    for path in output_dir.checkpoints(folder / "out"):  # to make room
        output_dir.remove(path)
    assert train(run, tiny_runs.Stop(0))["finished"]
    assert UnloadedModel(str(folder / "out")).is_plain


KILLS = """
import json, os, random, signal, sys, threading, time
from l2d_framework.config import parse_run
from l2d_framework.training.reward.run import train_reward
from l2d_framework.training.run import train_runs
from l2d_framework.training.token_trainer import TokenTrainer
from l2d_framework.writing import staged

run, wanted, draw, kills, inside, number = json.loads(sys.argv[1]), int(sys.argv[2]), random.Random(0), 0, 0, 0

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def at_file(count, folder):
    left = [count]
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "shutil.rmtree", "os.mkdir") and folder in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                die()
    sys.addaudithook(hook)

def train(output):
    parsed = parse_run(run | {"output_dir": output})
    train_reward(parsed) if run.get("kind") == "reward" else train_runs([parsed])

while kills < wanted:
    output = f"{run['output_dir']}_{number}"
    by_time, seconds, count = draw.random() < 0.5, draw.uniform(0, 3), draw.randint(1, 120)
    if (child := os.fork()) == 0:
        if by_time:
            threading.Timer(seconds, die).start()
        else:
            at_file(count, output)
        train(output)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    kills += code != 0
    names = os.listdir(output) if os.path.isdir(output) else []
    inside += any(name.endswith((".writing", ".replaced")) for name in names)
    number += code == 0
train(f"{run['output_dir']}_{number}")
print(json.dumps([kills, inside, number]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_killed_at_random_moments_and_while_saving_end_with_the_same_weights(folder: Path, kind: str) -> None:
    run = fields(folder, kind, max_steps=24, save_steps=3, eval_steps=None if kind == "reward" else 4)
    train(run)
    command = [sys.executable, "-W", "ignore", "-c", KILLS, json.dumps(run), "20"]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr[-3000:]
    kills, while_saving, last = json.loads(found.stdout.splitlines()[-1])
    assert kills == 20
    assert while_saving >= 3
    for number in range(last + 1):
        output = folder / f"out_{number}"
        assert_same(output, folder / "out")
        assert not list(output.glob("*.writing"))
        if kind != "reward":
            assert tiny_runs.losses(output) == tiny_runs.losses(folder / "out")
