"""Profiles with a table of their own run to their end, and what they measure of losses is what the losses are."""

import json
from pathlib import Path

import pytest
from tiny_runs import diffusion_run, tess_run, write_base, write_sums

pytest.importorskip("lm_eval")

from l2d_bench.bench import Bench
from l2d_bench.files import bench_folder
from l2d_bench.measures.base import Subject
from l2d_bench.measures.diagnosis import DiagnosisMeasure
from l2d_bench.measures.held_out import HeldOutMeasure
from l2d_bench.pool import Surroundings, run_jobs
from l2d_framework.config.files import read_file
from l2d_framework.config.parsing import parse_run
from l2d_framework.evaluation.diagnosis.batches import read_rows
from l2d_framework.evaluation.diagnosis.diagnose import Settings, diagnose
from l2d_framework.models.unloaded import UnloadedModel
from l2d_framework.training.output_dir import read_card
from l2d_framework.training.run import train_runs

SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
FEW = {"training.max_steps": 2, "training.batch_size": 4, "training.eval_steps": None, "training.save_steps": None}


def small(name: str, folder: Path) -> Path:
    """A copy of a profile that does the same with a few rows and updates."""
    profile = read_file(bench_folder() / "profiles" / f"{name}.yaml")
    for key, model in profile["models"].items():
        is_reward = "reward" in key
        changes = {name: value for name, value in FEW.items() if not (is_reward and value is None)}
        changes |= {f"scratch.config.{name}": value for name, value in SHAPE.items() if key == "base"}
        if is_reward:
            # A tokenizer of few texts makes long rows, and of few pairs half must be held out for any to be.
            changes |= {"data.eval_fraction": 0.5, "data.max_length": 512, "data.pad_to": 512}
        elif key != "tuned":
            places = ["train.0", "eval.0"] + ["train.1"] * (key == "adapted")
            changes |= {f"data.{place}.limit": 40 for place in places}
        model["set"] = model.get("set", {}) | changes
    for section in profile["data"].values():
        section["limit"] = 16
    for section in profile["measures"].values():
        if "limit" in section:
            section |= {"limit": 1, "options": {"num_inference_steps": 3}}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(profile), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["gsm8k_small", "tess_small"])
def test_the_profile_runs_to_its_end_at_a_tiny_size(name, tmp_path, datasets_dir, monkeypatch):
    monkeypatch.chdir(datasets_dir)
    table = read_file(bench_folder() / "tables" / "own" / f"{name}.yaml")
    if "sweep" in table["rows"][-1]:
        table["rows"][-1]["sweep"]["values"] = [0.0, 10.0]
    (tmp_path / "table.yaml").write_text(json.dumps(table), encoding="utf-8")
    made = Bench([str(tmp_path / "table.yaml")], str(small(name, tmp_path)), tmp_path / "out")
    made.prepare()
    assert run_jobs(made.jobs, Surroundings(workers=0), lambda event: None) == {}
    (filled,) = made.fill({})
    empty = {
        (filled.plan.rows[row].label, column) for (row, column), cell in filled.cells.items() if cell.value is None
    }
    wanted = {
        (row.label, column)
        for row in filled.plan.rows
        if row.model in ("l2d", "adapted", "tuned", "reward", "reward_held_out")
        for column in (row.columns or filled.plan.columns)
    }
    assert wanted.isdisjoint(empty)


def _check_diagnosis(model, data):
    times = [0.5, 0.9]
    found = DiagnosisMeasure(data=str(data), limit=5, times=times).run(Subject(str(model), {}, 0)).values
    rows, _ = read_rows(source := UnloadedModel(str(model)), [{"path": str(data), "limit": 5}], 512)
    lm = source.load("cpu")
    settings = Settings([0.0, *times], lm.sampling(num_inference_steps=2, solver="euler"), None)
    for t, point in zip(times, diagnose(lm, rows, settings, batch_size=2)["cross_entropy"][1:], strict=True):
        network, combination = point["network"]["value"], point["combination"]["value"]
        assert found[f"network_{t}"].value == pytest.approx(network, abs=1e-5)
        assert found[f"combination_{t}"].value == pytest.approx(combination, abs=1e-5)
        assert found[f"gain_{t}"].value == pytest.approx(combination - network, abs=1e-5)


@pytest.mark.parametrize("make", [diffusion_run, tess_run])
def test_what_a_run_starts_from_and_what_it_makes_differ_by_what_was_learnt(make, tmp_path):
    base, sums = write_base(tmp_path / "base"), write_sums(tmp_path / "sums.jsonl", 200)
    train_runs([parse_run({"kind": "diffusion", **make(base, sums, tmp_path / "run", eval_steps=None)})])
    values = HeldOutMeasure().run(Subject(str(tmp_path / "run"), {}, 0, card=read_card(tmp_path / "run"))).values
    assert values["after"].value < values["before"].value
    if make is diffusion_run:  # its network adds nothing before it has learnt
        assert values["before"].value == pytest.approx(values["base"].value, rel=1e-6)
        assert values["noise_difference"].value == pytest.approx(0, abs=0.05)
        _check_diagnosis(tmp_path / "run", sums)
    else:
        assert "base" not in values
