"""What commands say on standard error while they work."""

import io
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusion_models import random_tokens, shared_lm, tess_lm
from rich.console import Console
from tiny_runs import diffusion_run, write_base, write_sums
from transformers import StoppingCriteriaList

from l2d_framework.cli import meter, watching
from l2d_framework.cli.meter import Meter
from l2d_framework.cli.train import _reporting
from l2d_framework.cli.watching import Watch
from l2d_framework.writing import speed


@pytest.fixture
def hasty(monkeypatch):
    """Lines and counts in quick succession."""
    monkeypatch.setattr(meter, "SECONDS", 0.02)
    monkeypatch.setattr(watching, "_REFRESH", 0.0)


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


def test_without_a_terminal_a_line_is_written_every_so_often_even_in_a_long_step(hasty, capsys):
    with Meter("solving", "batches") as shown:
        for number in shown.track(range(3)):
            shown.facts = f"step {number}"
            if number == 2:
                time.sleep(0.5)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) >= 3
    assert lines[-1].startswith("solving  2/3 batches  step 2  ") and lines[-1].endswith(" s")


def test_a_quick_command_writes_no_line(capsys):
    with Meter("solving", "batches", 3) as shown:
        shown.advance()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_a_bar(terminal, capsys):
    with Meter("solving", "batches") as shown:
        for _ in shown.track(range(4), "measuring"):
            time.sleep(0.15)
    out, err = capsys.readouterr()
    assert out == ""
    assert "measuring  3/4 batches" in err


def test_an_error_ends_the_lines(hasty, capsys):
    with pytest.raises(ValueError, match="mine"), Meter("solving", "batches", 3):
        raise ValueError("mine")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


OPTIONS = {"max_new_tokens": 6, "seed": 1, "num_inference_steps": 3}


@pytest.mark.parametrize(("make", "more"), [(shared_lm, {}), (shared_lm, {"speculate": 2}), (tess_lm, {})])
def test_watching_changes_no_answer_and_counts_its_tokens_and_evaluations(hasty, make, more):
    lm, prompts = make("llama"), random_tokens(3, 5)
    is_whole = make is tess_lm
    plain = lm.generate(prompts, **OPTIONS, **more)
    with Meter("generating") as shown, Watch(shown, lm, counts_evaluations=is_whole) as watch:
        watched = lm.generate(prompts, stopping_criteria=StoppingCriteriaList([watch]), **OPTIONS, **more)
        watch.finish(3)
    assert torch.equal(plain.sequences, watched.sequences)
    if not more:
        assert f"{int(watched.lengths.sum())} tokens  " in shown.facts
    assert ("3 evaluations" in shown.facts) == is_whole
    assert "features" not in vars(lm)


def test_generating_says_how_many_prompts_are_answered_and_tokens_written(hasty, l2d, tmp_path):
    from l2d_framework.config import parse_run
    from l2d_framework.models.checkpoint import build_model, save

    run = diffusion_run(write_base(tmp_path / "base"), tmp_path / "none.jsonl", tmp_path / "model")
    save(build_model(parse_run({name: run[name] for name in run.keys() - {"data"}})), tmp_path / "checkpoint")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+1=\n2+2=\n3+3=\n")
    quick = ("--batch-size", 1, "--max-new-tokens", 30, "--num-inference-steps", 3)
    code, out, err = l2d("generate", tmp_path / "checkpoint", "--file", prompts, *quick)
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("generating")]
    assert any("  2/3 prompts  " in line and " tokens  " in line and " tokens/s  " in line for line in lines)
    assert "tokens/s" not in out


# Forked from a process that has imported much of what takes long, and no library that a command quietens.
FORKS = """
import os, sys
import pandas, scipy.stats, torch._inductor.decomposition, torch.distributed.tensor
from l2d_framework.cli import main

for number, options in enumerate(([], ["--verbose"])):
    if os.fork() == 0:
        os.environ["HF_DATASETS_CACHE"] += str(number)
        sys.argv = ["l2d", *options, "train", f"run{number}.yaml"]
        sys.exit(main())
    if os.wait()[1]:
        sys.exit(f"{options} failed")
    for stream in (sys.stdout, sys.stderr):
        print("\\f", end="", file=stream, flush=True)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `l2d train` and `l2d --verbose train` write to standard output and standard error."""
    folder = tmp_path_factory.mktemp("runs")
    base, data = write_base(folder / "base"), write_sums(folder / "sums.jsonl")
    for number in (0, 1):
        run = diffusion_run(base, data, folder / f"out{number}", logging_steps=3, max_steps=3)
        (folder / f"run{number}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(run))))
    kept_quiet_by = ("TRANSFORMERS_VERBOSITY", "HF_DATASETS_DISABLE_PROGRESS_BARS", "L2D_VERBOSE")
    environment = {name: value for name, value in os.environ.items() if name not in kept_quiet_by}
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (quiet_out, loud_out, _), (quiet_err, loud_err, _) = done.stdout.split("\f"), done.stderr.split("\f")
    return {(): (quiet_out, quiet_err), ("--verbose",): (loud_out, loud_err)}


def test_libraries_are_quiet_unless_they_are_asked(trained):
    assert trained[()][1].strip() == ""
    loud = trained["--verbose",][1]
    assert "Flattening the indices" in loud and "Loading weights" in loud


def test_training_without_a_terminal_is_never_silent_before_its_first_update_has_ended(hasty, capsys):
    log = io.StringIO()
    state = SimpleNamespace(is_world_process_zero=True, global_step=4, max_steps=8)

    def hears(text):
        end = time.monotonic() + 20
        while text not in capsys.readouterr().err:
            assert time.monotonic() < end, f"silent, no {text!r}"
            time.sleep(0.01)

    with _reporting(Console(file=log)) as report:
        hears("starting  ")
        (lines,) = report(SimpleNamespace(output_dir="runs/out"))
        hears("out  preparing  ")
        lines.on_train_begin(None, state, None)
        hears("out  4/8  in its first update  ")
        state.global_step = 5
        lines.on_step_end(None, state, None)
        capsys.readouterr()
        time.sleep(0.1)
        assert capsys.readouterr().err == ""
        for state.global_step in (6, 8):
            lines.on_step_end(None, state, None)
            lines.on_log(None, state, None, logs={"loss": 1.0})
    first, second, last = log.getvalue().splitlines()
    assert first.startswith("out  5/8  first update after ")
    assert second == "out  6/8  loss 1.0000  0:00:00 left"
    assert last == "out  8/8  loss 1.0000"


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [(0.0371, "0.037"), (0.5, "0.5"), (4.26, "4.3"), (9.99, "10"), (10.4, "10"), (1234.5, "1,234"), (0.0, "0")],
)
def test_a_speed_has_two_digits_however_slow(tokens, shown):
    assert speed(tokens) == f"{shown} tokens/s"


def test_training_without_a_terminal_reports_its_first_update(trained):
    first, second, *_ = trained[()][0].splitlines()
    assert first.startswith("out0  1/3  first update after ")
    assert second.startswith("out0  3/3  loss ")
