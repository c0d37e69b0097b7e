"""`l2d train --dry-run`, as a user sees it."""

import io
import json

import pytest
import tiny_runs
import yaml
from rich.console import Console

from l2d_framework.cli.dry_run import example, size
from l2d_framework.training.memory import SHARDS


@pytest.fixture
def run_file(tmp_path):
    base, data = tiny_runs.write_base(tmp_path / "base"), tiny_runs.write_sums(tmp_path / "sums.jsonl")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_runs.diffusion_run(base, data, tmp_path / "out")))
    return path


def test_tables_say_what_the_json_says_and_nothing_is_written(l2d, run_file, tmp_path, monkeypatch):
    options = ("--dry-run", "--devices", 2, "--shard", "full", "--tokens-per-second", 0.01)
    code, as_json, err = l2d("train", *options, "--json", run_file)
    assert code == 0, err
    (plan,) = json.loads(as_json)
    monkeypatch.setattr("l2d_framework.training.dry_run.dry_run", lambda *_: [plan])
    code, out, err = l2d("train", *options, run_file)
    assert code == 0, err
    shown = {
        row[0]: row[1:]
        for row in ([c.strip() for c in line.split("  ") if c.strip()] for line in out.splitlines())
        if row
    }
    assert shown["all"] == [f"{plan['parameters'][name]:,}" for name in ("total", "trained")]
    assert shown["peak, not all at once"] == [size(case["peak"]) for case in plan["memory"]["cases"]]
    assert shown["updates"] == [f"{plan['training']['steps']:,}"]
    assert shown["hours at 0.01 tokens/s"] == [f"{plan['training']['hours']:,.1f}"]
    assert plan["memory"]["devices"] == 2
    assert "memory of each of 2 devices, sharding: full" in out
    first = plan["examples"]["shown"]["example"]
    assert f"example: {first[0]['text']}[{first[1]['text']}]" in out
    assert not (tmp_path / "out").exists()


def test_a_terminal_shows_in_green_what_is_learnt():
    spans = [{"text": "[1+1=", "learnt": False}, {"text": "2", "learnt": True}]
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    console.print(example("example", spans, is_colored=True), highlight=False)
    assert "\x1b[32m2\x1b[0m" in console.file.getvalue()
    assert example("example", spans, is_colored=False).plain == "example: [1+1=[2]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", 2], "--devices says something of a dry run. Add --dry-run"),
        (["--json"], "--json says something of a dry run"),
        (["--dry-run", "--shard", "zero"], f"--shard must be one of {', '.join(SHARDS)}; got 'zero'"),
        (["--dry-run", "--devices", 3], "batch_size 4 is no multiple of "),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(l2d, run_file, options, message):
    code, _, err = l2d("train", *options, run_file)
    assert code == 2
    assert message in " ".join(err.split())
