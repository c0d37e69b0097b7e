"""Runs that are given more updates than they were begun with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from l2d_framework.config import parse_run
from l2d_framework.errors import CheckpointError, ConfigError, OutputError
from l2d_framework.training import output_dir
from l2d_framework.training.arguments import learning_rate
from l2d_framework.training.run import train_runs

QUICK = {"warmup_steps": 2, "save_steps": 2, "eval_steps": 2, "decay": "constant"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer")
    tiny_runs.write_base(folder / "base")
    tiny_runs.write_sums(folder / "sums.jsonl", 14)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    train(fields(folder, "whole", max_steps=8))
    return folder / "whole"


def fields(folder: Path, name: str, kind: str = "diffusion", **training: Any) -> dict[str, Any]:
    # Some eleven rows and batches of four: an epoch ends within the third update.
    training = {**QUICK, **training}
    if kind == "language_model":
        sections = {"model": {"base": str(folder / "base")}, "lora": {"rank": 2, "dropout": 0.1}}
        return tiny_runs.language_model_run(folder / "sums.jsonl", folder / name, training=training, **sections)
    run = tiny_runs.diffusion_run(folder / "base", folder / "sums.jsonl", folder / name, **training)
    if kind == "stream":
        run["data"] |= {"streaming": True, "eval_fraction": 0.0, "shuffle_buffer": 4}
        run["training"] |= {"eval_steps": None}
    return run


def train(run: dict[str, Any], *callbacks: TrainerCallback) -> dict[str, Any]:
    return train_runs([parse_run(run)], callbacks=lambda _: callbacks)[0]


def weights(output: Path) -> dict[str, torch.Tensor]:
    files = sorted(output.glob("*.safetensors")) + sorted(output.glob("adapter/*.safetensors"))
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def are_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys() != set()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def rates(output: Path) -> dict[int, float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}


@pytest.mark.parametrize("kind", ["diffusion", "stream", "language_model"])
def test_a_finished_run_with_more_updates_is_the_longer_run_where_the_rate_is_constant(
    folder: Path, whole: Path, kind: str
) -> None:
    longer = folder / f"longer_{kind}"
    if kind != "diffusion":
        whole = folder / f"whole_{kind}"
        train(fields(folder, whole.name, kind, max_steps=8))
    short = train(fields(folder, longer.name, kind, max_steps=4))
    assert not are_same(weights(longer), weights(whole))
    card = train(fields(folder, longer.name, kind, max_steps=8))
    assert tiny_runs.losses(longer) == tiny_runs.losses(whole)
    assert rates(longer) == rates(whole)
    assert are_same(weights(longer), weights(whole))
    (entry,) = card["continued"]
    assert (entry["updates"], entry["result"], entry["ended"]) == (4, short["result"], short["ended"])
    assert entry["changes"] == ["training.max_steps: 4 there, 8 now"]
    assert card["result"]["steps"] == card["config"]["training"]["max_steps"] == 8
    assert card == output_dir.read_card(longer)


def test_more_epochs_go_on_too_and_no_epoch_at_all_where_updates_are_counted(folder: Path) -> None:
    train(fields(folder, "epochs", epochs=1, max_steps=None))
    assert train(fields(folder, "epochs", epochs=2, max_steps=None))["result"]["steps"] == 5
    train(fields(folder, "epochs", epochs=5, max_steps=6))
    assert train(fields(folder, "epochs", epochs=1, max_steps=6), tiny_runs.Stop(0))["result"]["steps"] == 6


def test_the_learning_rate_is_that_of_the_new_number_of_updates_from_where_it_goes_on_which_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short, longer = (fields(folder, "falling", decay="linear", max_steps=steps) for steps in (3, 6))
    train(short)
    assert not caplog.records
    train(longer)
    record, _ = caplog.records
    assert "has made 3 updates and goes on to 6" in record.getMessage()
    assert "other rates than those of a run of 6" in record.getMessage()
    expected = [
        learning_rate(parse_run(run).training, step, run["training"]["max_steps"])
        for run, steps in ((short, range(3)), (longer, range(3, 6)))
        for step in steps
    ]
    assert list(rates(folder / "falling").values()) == expected


def test_the_model_of_fewer_updates_stays_until_that_of_more_is_whole(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(fields(folder, "steps", max_steps=4))
    output = folder / "steps"
    files = {path: path.read_bytes() for path in output.glob("*.*") if path.is_file() and path.name != "run.json"}
    longer = fields(folder, "steps", max_steps=8)
    with pytest.raises(KeyboardInterrupt):
        train(longer, tiny_runs.Stop(7))
    assert {path: path.read_bytes() for path in files} == files
    card = output_dir.read_card(output)
    assert (card["finished"], card["continued"][0]["updates"]) == (False, 4)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("l2d_framework.training.run.model_card_table", full)
        with pytest.raises(OutputError, match=r"could not be written.* checkpoint-8, .* is whole"):
            train(longer)
    assert {path: path.read_bytes() for path in files} == files
    assert len(train(longer)["continued"]) == 1
    assert are_same(weights(output), weights(whole))


def test_an_unfinished_run_takes_another_number_of_updates_and_other_intervals(folder: Path) -> None:
    train(fields(folder, "other_whole", max_steps=7, save_steps=1, eval_steps=1))
    with pytest.raises(KeyboardInterrupt):
        train(fields(folder, "other", max_steps=9), tiny_runs.Stop(3))
    card = train(fields(folder, "other", max_steps=7, save_steps=1, eval_steps=3, save_total_limit=5))
    assert card["continued"][0] == {
        "at": card["continued"][0]["at"],
        "changes": ["training.max_steps: 9 there, 7 now"],
        "updates": 2,
        "after": "checkpoint-2",
    }
    assert [path.name for path in output_dir.checkpoints(folder / "other")] == [f"checkpoint-{n}" for n in range(3, 8)]
    assert [step for step, entry in tiny_runs.losses(folder / "other").items() if "eval_loss" in entry] == [2, 3, 6, 7]
    assert are_same(weights(folder / "other"), weights(folder / "other_whole"))


def test_a_checkpoint_tells_transformers_own_trainer_when_to_log_and_to_save(whole: Path, tmp_path: Path) -> None:
    state = TrainerState.load_from_json(str(output_dir.checkpoints(whole)[-1] / "trainer_state.json"))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], save_steps=2)
    control = DefaultFlowCallback().on_step_end(arguments, state, TrainerControl())
    assert (state.save_steps, state.eval_steps, control.should_save) == (2, 2, True)


def test_intervals_alone_train_a_finished_run_no_further(folder: Path) -> None:
    train(fields(folder, "done", max_steps=2))
    before = (folder / "done" / "run.json").read_bytes()
    train(fields(folder, "done", max_steps=2, save_steps=1, logging_steps=5, save_total_limit=1), tiny_runs.Stop(0))
    assert (folder / "done" / "run.json").read_bytes() == before


@pytest.mark.parametrize("trackers", [["tensorboard"], ["tensorboard", "wandb"]])
def test_trackers_may_come_and_go_whenever_a_run_goes_on(tmp_path: Path, trackers: list[str]) -> None:
    with_them, without = (
        parse_run(fields(tmp_path, "tracked", max_steps=4, report_to=names)).model_dump(mode="json")
        for names in (trackers, [])
    )
    for before, now in ((without, with_them), (with_them, without)):
        output = tmp_path / f"tracked_{len(before['training']['report_to'])}"
        (output / "checkpoint-1").mkdir(parents=True)
        output_dir.write_card(output, {"config": before, "finished": False})
        assert output_dir.check_free(output, now) == output_dir.read_card(output)


def test_a_start_without_a_tracker_keeps_the_run_that_it_is_there(folder: Path) -> None:
    run = fields(folder, "tracked", max_steps=3)
    with pytest.raises(KeyboardInterrupt):
        train(run, tiny_runs.Stop(1))
    output = folder / "tracked"
    output_dir.write_card(output, output_dir.read_card(output) | {"wandb": "0badcafe"})  # of a start with it
    assert train(run)["wandb"] == "0badcafe"


def test_whatever_else_has_changed_is_still_refused_by_name(folder: Path) -> None:
    train(fields(folder, "refused", max_steps=2))
    with pytest.raises(ConfigError, match=r"configuration \(training\.learning_rate: 0\.03 there, 0\.02 now\)"):
        train(fields(folder, "refused", max_steps=4, learning_rate=0.02))


@pytest.mark.parametrize("is_finished", [True, False])
def test_fewer_updates_than_were_made_are_refused_and_change_nothing(folder: Path, is_finished: bool) -> None:
    name = f"fewer_{is_finished}"
    if is_finished:
        train(fields(folder, name, max_steps=4))
    else:
        with pytest.raises(KeyboardInterrupt):
            train(fields(folder, name, max_steps=9), tiny_runs.Stop(5))
    before = (folder / name / "run.json").read_bytes()
    for training in ({"max_steps": 3}, {"max_steps": None, "epochs": 1}):
        with pytest.raises(ConfigError, match=r"has made 4 updates, and training\.max_steps or .* ask for 3\. Ask"):
            train(fields(folder, name, **training))
    assert (folder / name / "run.json").read_bytes() == before


def test_a_finished_run_whose_checkpoints_are_gone_says_so_instead_of_beginning_anew(folder: Path) -> None:
    train(fields(folder, "gone", max_steps=2))
    shutil.rmtree(folder / "gone" / "checkpoint-2")
    for training in ({"max_steps": 4}, {"max_steps": None, "epochs": 2}):
        with pytest.raises(CheckpointError, match="has made 2 updates, but its checkpoints are gone"):
            train(fields(folder, "gone", **training))
    # As many as were made are there.
    assert train(fields(folder, "gone", max_steps=2), tiny_runs.Stop(0))["finished"]


@pytest.mark.parametrize("kind", ["diffusion", "language_model"])
def test_an_unfinished_run_whose_checkpoints_are_gone_says_so_too(folder: Path, kind: str) -> None:
    run = fields(folder, f"lost_{kind}", kind, max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        train(run, tiny_runs.Stop(5))
    output = folder / f"lost_{kind}"
    # As is a run with another rate: of this one there is something left to know.
    for other, text in ((run, "has made 4 updates, but its checkpoints are gone"), (None, "learning_rate: 0.03 there")):
        for path in output_dir.checkpoints(output):
            output_dir.remove(path)
        shutil.rmtree(output / "best", ignore_errors=True)
        with pytest.raises((CheckpointError, ConfigError), match=text):
            train(other or fields(folder, output.name, kind, max_steps=6, learning_rate=0.01))
    assert train_runs([parse_run(run)], overwrite=True)[0]["sessions"] == 1


def test_a_run_of_which_nothing_was_saved_says_that_it_begins_from_its_start(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = fields(folder, "unsaved", max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(run, tiny_runs.Stop(1))
    assert not caplog.records
    train(run)
    assert [record.getMessage() for record in caplog.records] == [
        f"{str(folder / 'unsaved')!r} was begun before and has no checkpoint: it begins from its start."
    ]


def test_a_run_that_goes_on_says_so_before_weights_are_loaded(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(fields(folder, "goes_on", max_steps=6), tiny_runs.Stop(5))
    assert not caplog.records

    def loads(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("l2d_framework.training.run._learner", loads)
    with pytest.raises(KeyboardInterrupt):
        train(fields(folder, "goes_on", max_steps=6))
    assert caplog.messages == [f"Going on from {str(folder / 'goes_on' / 'checkpoint-4')!r} (4 of 6 updates)."]


def test_updates_of_a_damaged_checkpoint_do_not_count_as_made(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(fields(folder, "three", max_steps=3))
    for steps, name in ((3, "spoilt"), (6, "spoilt_more")):
        with pytest.raises(KeyboardInterrupt):
            train(fields(folder, name, max_steps=9), tiny_runs.Stop(5))
        (folder / name / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
        card = train(fields(folder, name, max_steps=steps))
        assert [(entry["updates"], entry["after"]) for entry in card["continued"]] == [(2, "checkpoint-2")]
        assert f"has made 2 updates and goes on to {steps}" in caplog.text
    assert are_same(weights(folder / "spoilt"), weights(folder / "three"))
    # But those of a model that was finished do, whatever has become of its checkpoint.
    (folder / "three" / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"has made 3 updates, and .* ask for 2"):
        train(fields(folder, "three", max_steps=2))


def test_a_stage_over_which_a_later_one_has_begun_is_not_trained_further(folder: Path) -> None:
    def stages(steps: int, second: str) -> list[Any]:
        below = fields(folder, "below", "language_model", max_steps=steps) | {"lora": None}
        above = fields(folder, second, max_steps=1) | {"model": {"base": below["output_dir"]}}
        return [parse_run(below), parse_run(above)]

    train_runs(stages(1, "above"))
    with pytest.raises(ConfigError, match=r"below' would be trained further, but '.*above' has begun over it"):
        train_runs(stages(2, "above"))
    assert [card["result"]["steps"] for card in train_runs(stages(2, "above_again"))] == [2, 1]
