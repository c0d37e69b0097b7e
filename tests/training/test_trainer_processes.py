import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import process_jobs
import pytest
import tiny_runs
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

import l2d_framework as l2d
from l2d_framework import cli
from l2d_framework.config import parse_run
from l2d_framework.training.run import train_runs

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
METHODS = {"l2d": tiny_runs.diffusion_run, "tess": tiny_runs.tess_run}
LARGE = {"max_steps": 3, "batch_size": 8}


def stages(folder: Path, kind: str, **training: Any) -> dict[str, dict[str, Any]]:
    quick = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}
    runs = {
        name: method(folder / "base", folder / "sums.jsonl", folder / kind / name, **{**quick, **training})
        for name, method in METHODS.items()
    }
    # A schedule that hears the losses of all processes, in few knots so that it is felt.
    runs["l2d"]["schedule"] = {"name": "information", "base": runs["l2d"]["schedule"], "knots": 8}
    return runs


def stream(folder: Path, output: str) -> dict[str, Any]:
    """A run over a stream of which each of two processes reads one of two files."""
    quick = {"max_steps": 4, "save_steps": None, "eval_steps": None}
    run = tiny_runs.diffusion_run(folder / "base", folder / "part-*.jsonl", folder / output, **quick)
    run["data"] |= {"streaming": True, "shards": 2, "shuffle_buffer": 4, "eval_fraction": 0.0}
    return run


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of what one and two processes trained, and what the latter printed."""
    folder = tmp_path_factory.mktemp("processes")
    base, sums = tiny_runs.write_base(folder / "base"), tiny_runs.write_sums(folder / "sums.jsonl", 14)
    rows = sums.read_text().splitlines(keepends=True)
    for part in (0, 1):
        (folder / f"part-{part}.jsonl").write_text("".join(rows[part::2]))
    for run in [*stages(folder, "one").values(), stream(folder, "one/stream")]:
        train_runs([parse_run(run)])
    mixed = stages(folder, "mixed", save_steps=1)["l2d"]
    with pytest.raises(KeyboardInterrupt):
        train_runs([parse_run(mixed)], callbacks=lambda _: [tiny_runs.Stop(1)])
    small = {"max_steps": 4, "save_steps": None, "eval_steps": None}
    faults = {
        name: tiny_runs.diffusion_run(base, sums, folder / "out" / name, **small, non_finite=what)
        for name, what in (("skip", "skip"), ("stop", "stop"), ("signal", "stop"))
    } | {"lost": stream(folder, "out/lost")}
    # Each process takes one sequence at a time: two micro-batches per update, unlike the single process.
    plain = [*stages(folder, "two", micro_batch_size=1).values(), stream(folder, "two/stream")]
    (folder / "run.json").write_text(
        json.dumps({"stages": list(stages(folder, "shares", micro_batch_size=1).values())})
    )
    short = [
        make(base, sums, folder / "short" / name, micro_batch_size="auto", **LARGE) for name, make in METHODS.items()
    ]
    answers = [generation(folder, "two"), evaluation(folder) if importlib.util.find_spec("lm_eval") else None]
    jobs = {"answers": answers, "faults": faults, "short": short, "plain": plain, "mixed": mixed}
    jobs["shares"] = str(folder / "run.json")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ran = subprocess.run(
        [*LAUNCH, "--nproc-per-node=2", str(process_jobs.__file__), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for run in (mixed, faults["lost"]):
        train_runs([parse_run(run)])
    return folder, ran.stdout


def generation(folder: Path, name: str) -> list[str]:
    """Arguments of `l2d generate` that answer prompts, some of them the same."""
    prompts = [word for sum_ in ("1+1=", "2+12=", "1+1=", "3+30=", "1+1=") for word in ("--prompt", sum_)]
    how = ("--num-inference-steps", "3", "--max-new-tokens", "4", "--do-sample", "--batch-size", "1")
    return [str(folder / "one" / "l2d"), *prompts, *how, "--out", str(folder / f"{name}.jsonl")]


def evaluation(folder: Path) -> dict[str, str]:
    return {"tasks": str(tiny_runs.write_tasks(folder / "tasks")), "model": str(folder / "one" / "l2d")}


@pytest.mark.filterwarnings("ignore")  # of lm_eval
def test_two_processes_answer_and_evaluate_like_one(launched):
    folder, printed = launched
    pytest.importorskip("lm_eval")
    alone = CliRunner().invoke(cli.app, ["generate", *generation(folder, "alone")])
    assert printed.startswith(alone.stdout) and printed.count("==> Prompt 0") == 1
    assert (folder / "two.jsonl").read_bytes() == (folder / "alone.jsonl").read_bytes()
    assert not list(folder.glob("*.part*"))
    found = [json.loads((folder / f"evaluated_{rank}.json").read_text()) for rank in (0, 1)]
    results, written = process_jobs.evaluated(**evaluation(folder))
    assert [one for one, _ in found] == [results, None]
    shares = [share for _, share in found]
    assert min(shares) > 0 and sum(shares) == written


def assert_same_losses(found: Path, wanted: Path) -> None:
    two, one = tiny_runs.losses(found), tiny_runs.losses(wanted)
    assert two.keys() == one.keys()
    for step, expected in one.items():
        assert two[step] == pytest.approx(expected, rel=1e-5), (found, step)


@pytest.mark.parametrize("kind", ["two", "shares"])
def test_two_processes_train_like_one_with_whole_weights_and_with_shares(launched, kind):
    folder, _ = launched
    for name in METHODS:
        output = folder / kind / name
        assert_same_losses(output, folder / "one" / name)
        assert json.loads((output / "run.json").read_text())["hardware"]["processes"] == 2
        states = [path.name for path in sorted((output / "checkpoint-4").glob("rng*"))]
        assert states == ["rng_state_0.pth", "rng_state_1.pth"]
    two, one = (load_file(folder / which / "l2d" / "diffusion.safetensors") for which in (kind, "one"))
    heard = one["schedule._extra_state"]
    assert heard.any()
    assert_close(two["schedule._extra_state"], heard, rtol=1e-4, atol=1e-4)


def test_processes_that_read_a_shard_each_train_like_one_and_one_goes_on_where_a_source_was_lost(launched):
    folder, _ = launched
    for found in ("two/stream", "out/lost"):
        assert_same_losses(folder / found, folder / "one" / "stream")
    kept = [path.name for path in (folder / "out" / "lost").glob("checkpoint-3/stream-*")]
    assert sorted(kept) == ["stream-0.json", "stream-1.json"]
    assert json.loads((folder / "out" / "lost" / "run.json").read_text())["sessions"] == 2


def test_the_command_publishes_whole_models_of_shares(launched):
    folder, printed = launched
    assert printed.count("Generate with:") == len(METHODS)
    for name in METHODS:
        shared, alone = (l2d.load(folder / kind / name) for kind in ("shares", "one"))
        # Adam turns rounding of gradients near zero into steps of the size of the rate, 3e-2.
        assert_close(shared.own_parameters(), alone.own_parameters(), rtol=1e-3, atol=1e-3)
        assert shared.generate(["1+1="], max_new_tokens=2).sequences.shape[1] > 0


def test_each_process_has_a_share_and_no_more_than_one_unit_is_gathered(launched):
    folder, _ = launched
    found = [json.loads((folder / f"shares_{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(one["own"] for one in found) == found[0]["all"]
    assert max(one["own"] for one in found) < 0.6 * found[0]["all"]
    assert [one["most gathered"] for one in found] == [1, 1]


def test_a_checkpoint_of_one_process_goes_on_in_shares_and_again_in_one_process(launched):
    folder, _ = launched
    assert json.loads((folder / "mixed" / "l2d" / "run.json").read_text())["sessions"] == 3
    assert_same_losses(folder / "mixed" / "l2d", folder / "one" / "l2d")


def test_processes_agree_on_what_is_left_out_on_divergence_and_on_a_signal_that_one_of_them_has_got(launched):
    folder, _ = launched
    ended = {
        name: [int((folder / f"{name}_{rank}").read_text()) for rank in (0, 1)]
        for name in ("skip", "stop", "signal", "lost")
    }
    assert ended == {"skip": [0, 0], "stop": [3, 3], "signal": [143, 143], "lost": [6, 6]}
    out = folder / "out"
    assert json.loads((out / "skip" / "run.json").read_text())["result"]["skipped_updates"] == 1
    assert {path.name for path in (out / "stop" / "diverged").iterdir()} == {
        *("batches_0.pt", "batches_1.pt", "checkpoint-2", "what.txt")
    }
    assert [path.name for path in out.glob("signal/checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("name", METHODS)
def test_processes_agree_on_the_size_when_one_of_them_is_short_of_memory(launched, tmp_path, name):
    folder, _ = launched
    card = json.loads((folder / "short" / name / "run.json").read_text())
    assert card["result"]["micro_batch_size"] == 1
    run = METHODS[name](folder / "base", folder / "sums.jsonl", tmp_path / "alone", **LARGE)
    train_runs([parse_run(run)])
    found, wanted = tiny_runs.losses(folder / "short" / name), tiny_runs.losses(tmp_path / "alone")
    for step, losses in wanted.items():
        assert found[step] == pytest.approx(losses, abs=1e-5)
