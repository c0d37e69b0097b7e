import errno
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from forks import Fork
from transformers import TrainerCallback

from l2d_framework.config import parse_run
from l2d_framework.errors import CheckpointError, ConfigError, Interrupted, UnreachableError
from l2d_framework.models import checkpoint
from l2d_framework.training import output_dir
from l2d_framework.training.data import sources
from l2d_framework.training.run import train_runs

KILLED = """
import json, os, signal, sys
from transformers import TrainerCallback
from l2d_framework.config import parse_run
from l2d_framework.training.learner import Denoiser
from l2d_framework.training.run import train_runs

run = json.loads(sys.argv[1])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()

write = Denoiser.checkpoint

def write_half(self, folder):
    write(self, folder)
    if folder.name.startswith("checkpoint-6"):
        (folder / "diffusion.safetensors").write_bytes(b"half")
        die()

for step, how in ((5, write), (None, write_half)):
    if (child := os.fork()) == 0:
        Denoiser.checkpoint = how
        train_runs([parse_run(run)], callbacks=lambda _: [Kill(step)])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_runs.write_base(folder / "base")
    tiny_runs.write_sums(folder / "sums.jsonl", 14)
    return folder


def fields(folder: Path, name: str, **training: Any) -> dict[str, Any]:
    # Some eleven rows and batches of four: an epoch ends within the third update.
    return tiny_runs.diffusion_run(folder / "base", folder / "sums.jsonl", folder / name, **training)


def train(run: dict[str, Any], *callbacks: TrainerCallback, overwrite: bool = False) -> dict[str, Any]:
    return train_runs([parse_run(run)], overwrite=overwrite, callbacks=lambda _: callbacks)[0]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    train(fields(folder, "whole"))
    return folder / "whole"


def assert_same(output: Path, whole: Path) -> None:
    assert tiny_runs.losses(output) == tiny_runs.losses(whole)
    ours, theirs = checkpoint.load(output), checkpoint.load(whole)
    for name, value in ours.own_parameters().items():
        assert torch.equal(value, theirs.own_parameters()[name]), name


def test_a_run_killed_between_and_within_checkpoints_resumes_with_the_same_losses(folder: Path, whole: Path) -> None:
    run = fields(folder, "killed")
    with Fork(folder, KILLED, json.dumps(run)) as fork:
        fork.ended()
    out, errors = fork.printed()
    assert out.split() == [str(-signal.SIGKILL)] * 2, errors
    assert [path.name for path in output_dir.checkpoints(folder / "killed")] == ["checkpoint-3"]
    assert (folder / "killed" / "checkpoint-6.writing").is_dir()
    card = train(run)
    assert card["sessions"] == 3
    assert_same(folder / "killed", whole)
    assert not list((folder / "killed").glob("*.writing"))


def test_a_run_stopped_in_a_later_epoch_resumes_with_the_same_losses(folder: Path, whole: Path) -> None:
    run = fields(folder, "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(run, tiny_runs.Stop(8))
    train(run)
    assert_same(folder / "stopped", whole)


def test_a_run_resumes_between_logs_and_within_accumulation_settings(folder: Path) -> None:
    training = {"logging_steps": 2, "micro_batch_size": 1, "save_steps": 3, "max_steps": 6}
    train(fields(folder, "sparse", **training))
    run = fields(folder, "sparse_stopped", **training)
    with pytest.raises(KeyboardInterrupt):
        train(run, tiny_runs.Stop(5))
    train(run)
    assert_same(folder / "sparse_stopped", folder / "sparse")


def test_a_run_along_its_own_trajectory_resumes_and_is_loaded_with_what_it_carries(folder: Path) -> None:
    def run(name: str) -> dict[str, Any]:
        made = fields(folder, name, max_steps=4, save_steps=2, eval_steps=2, unroll={"most": 4})
        made["backbone"] |= {"carry": True}
        return made

    train(run("unrolled"))
    with pytest.raises(KeyboardInterrupt):
        train(run("unrolled_stopped"), tiny_runs.Stop(3))
    train(run("unrolled_stopped"))
    assert_same(folder / "unrolled_stopped", folder / "unrolled")
    assert checkpoint.load(folder / "unrolled").own_parameters()["backbone.carried"].any()


def streamed(folder: Path, name: str, **training: Any) -> dict[str, Any]:
    run = fields(folder, name, eval_steps=None, max_steps=6, **training)
    run["data"] |= {"streaming": True, "eval_fraction": 0.0, "shuffle_buffer": 4}
    return run


@pytest.fixture(scope="module")
def stream(folder: Path) -> Path:
    train(streamed(folder, "stream"))
    return folder / "stream"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_resumes_with_the_same_losses_and_without_reading_again_what_was_read(
    folder: Path, stream: Path, workers: int
) -> None:
    run = streamed(folder, f"stream_{workers}", dataloader_workers=workers)
    with pytest.raises(KeyboardInterrupt):
        train(run, tiny_runs.Stop(5))
    place = json.loads((folder / f"stream_{workers}" / "checkpoint-3" / "stream-0.json").read_text())
    assert place["epoch"] * 14 + place["first"] + place["taken"] == 12
    assert place["taken"] <= 2
    train(run)
    assert_same(folder / f"stream_{workers}", stream)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("is_ended", [False, True], ids=["for good", "when a signal comes"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_whose_source_is_lost_saves_and_goes_on_as_if_nothing_had_been(
    folder: Path, stream: Path, workers: int, is_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = streamed(folder, f"lost_{workers}_{is_ended}", dataloader_workers=workers, save_steps=None)
    read, times = sources.read_objects, itertools.count()
    trainer, signals, sleep = os.getpid(), [signal.SIGTERM], time.sleep

    def lose(*options: Any) -> Iterator[Any]:
        # At the beginning of the second epoch; four times it is opened to look at it.
        if next(times) > 4:
            raise OSError(errno.ESTALE, "Stale file handle")
        yield from read(*options)

    def wait(seconds: float) -> None:
        if is_ended and signals:
            sleep(0.3 * workers)  # until what the worker has read before is learnt
            os.kill(trainer, signals.pop())
            sleep(0.3)

    words = "SIGTERM" if is_ended else r"sums.jsonl' .* 5 new tries: OSError: .*Stale file handle\. Training ended"
    error = Interrupted if is_ended else UnreachableError
    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_objects", lose)
        patch.setattr(time, "sleep", wait)
        words += r" after update (\d) of 6: saved .*checkpoint-\1'; the same command"
        with pytest.raises(error, match=words) as lost:
            train(run)
    assert lost.value.exit_code == (143 if is_ended else 6)
    train(run)
    assert_same(Path(run["output_dir"]), stream)


def test_workers_change_no_loss(folder: Path, whole: Path) -> None:
    train(fields(folder, "workers", dataloader_workers=2))
    assert tiny_runs.losses(folder / "workers") == tiny_runs.losses(whole)


def test_a_kill_after_the_last_update_resumes_to_a_finished_run(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fields(folder, "late")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output_dir, "publish", fail)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert not json.loads((folder / "late" / "run.json").read_text())["finished"]
    train(run)
    assert_same(folder / "late", whole)


def test_a_finished_run_is_not_trained_again(folder: Path, whole: Path) -> None:
    before = (whole / "run.json").read_bytes()
    card = train(fields(folder, "whole"), tiny_runs.Stop(0))
    assert card["finished"]
    assert (whole / "run.json").read_bytes() == before


def test_another_configuration_in_the_same_folder_is_refused_by_key(folder: Path, whole: Path) -> None:
    run = fields(folder, "whole", learning_rate=5e-3)
    with pytest.raises(ConfigError, match=r"training\.learning_rate: 0\.03 there, 0\.005 now"):
        train(run)


@pytest.mark.parametrize("kind", ["diffusion", "language_model"])
def test_a_run_goes_on_over_a_base_that_has_moved_and_over_no_other(folder: Path, kind: str) -> None:
    tiny_runs.write_base(folder / "other_base", seed=1)

    def run(base: str) -> dict[str, Any]:
        model = {"base": str(folder / base)}
        if kind == "diffusion":
            return fields(folder, f"moved_{kind}", max_steps=4, save_steps=2) | {"model": model}
        sections = {"model": model, "lora": {"rank": 2}, "training": {"max_steps": 4, "save_steps": 2}}
        return tiny_runs.language_model_run(folder / "sums.jsonl", folder / f"moved_{kind}", **sections)

    with pytest.raises(KeyboardInterrupt):
        train(run("base"), tiny_runs.Stop(3))
    (folder / "base").rename(folder / "new_base")
    try:
        with pytest.raises(ConfigError, match=r"model\.base: no such folder, got '.*base'; name where it lies"):
            train(run("base"))
        with pytest.raises(ConfigError, match=r"model\.base: .* there, .*other_base' now"):
            train(run("other_base"))
        card = train(run("new_base"))
    finally:
        (folder / "new_base").rename(folder / "base")
    assert (card["finished"], card["sessions"]) == (True, 2)
    assert card["config"]["model"]["base"] == str(folder / "new_base")
    changes = [f"model.base: {str(folder / 'base')!r} there, {str(folder / 'new_base')!r} now"]
    assert card["moved"] == [{"at": card["moved"][0]["at"], "changes": changes, "after": "checkpoint-2"}]


def test_overwriting_moves_the_old_run_aside(folder: Path) -> None:
    run = fields(folder, "twice", max_steps=1)
    train(run)
    train(fields(folder, "twice", max_steps=2), overwrite=True)
    assert json.loads((folder / "twice.old-1" / "run.json").read_text())["result"]["steps"] == 1
    assert json.loads((folder / "twice" / "run.json").read_text())["result"]["steps"] == 2


def test_a_folder_of_something_else_is_refused(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds no run\.json"):
        train(fields(folder, "photos"))


def test_a_damaged_card_is_refused(folder: Path) -> None:
    (folder / "damaged").mkdir()
    (folder / "damaged" / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        train(fields(folder, "damaged"))


def test_replacing_a_folder_survives_a_kill_at_every_step(tmp_path: Path) -> None:
    target = tmp_path / "best"

    def content() -> str | None:
        return (target / "it").read_text() if target.exists() else None

    for done in range(3):
        for path in tmp_path.iterdir():
            output_dir.remove(path)
        target.mkdir()
        (target / "it").write_text("old")
        stage = tmp_path / "best.writing"
        stage.mkdir()
        (stage / "it").write_text("new")
        if done > 0:
            os.replace(target, tmp_path / "best.replaced")
        if done > 1:
            os.replace(stage, target)
        output_dir.clean_up(tmp_path)
        assert content() == ("new" if done == 2 else "old")
        assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_run_that_was_refused_before_its_first_update_leaves_its_folder_free(folder: Path) -> None:
    run = tiny_runs.diffusion_run(folder / "base", folder / "sums.jsonl", folder / "refused", max_steps=1)
    (folder / "empty").mkdir()
    for file in (folder / "base").iterdir():
        if file.suffix != ".safetensors":
            (folder / "empty" / file.name).write_bytes(file.read_bytes())
    (folder / "empty" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is damaged"):
        train(run | {"model": {"base": str(folder / "empty")}})
    assert [path.name for path in (folder / "refused").iterdir()] == [output_dir.RUN_FILE]
    assert train(run)["finished"]
