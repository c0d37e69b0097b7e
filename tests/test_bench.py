"""The files of bench/: run files that parse and fit their models, reports that say what was measured."""

import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console
from tiny_models import tiny_lm

from l2d_framework.config import check_runs, load_run

RUNS = sorted((Path(__file__).parents[1] / "bench" / "runs").glob("*.yaml"))


@pytest.fixture(scope="module")
def speed() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bench_speed", RUNS[0].parents[1] / "speed.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_files_fit_a_model_of_their_family(path, tmp_path):
    runs = load_run(path)
    written = [run.output_dir for run in runs]
    overrides = []
    for index, run in enumerate(runs):
        where = f"stages.{index}." if len(runs) > 1 else ""
        overrides.append(f"{where}output_dir={tmp_path / run.output_dir}")
        if run.model is not None:
            base = run.model.base
            overrides.append(f"{where}model.base={tmp_path / base}")
            if base not in written:  # stands in for the model of this name on the hub
                tiny_lm("qwen2" if "Qwen" in base else "llama").save_pretrained(tmp_path / base)
    check_runs(load_run(path, overrides))


def test_every_preset_trains_on_the_papers_data():
    runs = [run for path in RUNS if path.stem.startswith("l2d_") for run in load_run(path)]
    unlabelled = [[s.model_copy(update={"class_name": None, "class_column": None}) for s in r.data.train] for r in runs]
    assert all(sources == unlabelled[0] for sources in unlabelled)
    assert {source.split for run in runs for source in run.data.eval} == {"test"}


def _samples(speed, **seconds):
    return {name: [speed.Sample(cpu, 2 * cpu, 0.5) for cpu in row] for name, row in seconds.items()}


def test_ratios_are_medians_over_rounds_so_that_a_slow_round_does_not_count(speed):
    samples = {"decode, batch 1": _samples(speed, plain=[1.0, 9.0, 1.0], other=[4.0, 36.0, 8.0])}
    case = speed.summarize(samples, unit="cpu", memory={})["groups"]["decode, batch 1"]["other"]
    assert case["cost"] == 4.0
    assert case["speed"] == 0.25
    assert case["seconds"] == 8.0


def test_targets_are_met_from_the_right_side(speed):
    def met(cost):
        groups = {group for group, *_ in speed.TARGETS}
        names = {name for _, name, *_ in speed.TARGETS}
        samples = {g: {"reference": [speed.Sample(1.0, 1.0)]} for g in groups}
        for row in samples.values():
            row |= {name: [speed.Sample(cost, cost)] for name in names}
        return {t["what"]: t["met"] for t in speed.summarize(samples, unit="wall", memory={})["targets"]}

    assert met(0.5) == {"cost": True, "speed": True}
    assert met(1.3) == {"cost": True, "speed": False}
    assert met(99.0) == {"cost": False, "speed": False}


def test_tables_show_every_case_with_its_ratio_and_memory(speed):
    samples = {
        "decode, batch 1": _samples(speed, plain=[0.002], other=[0.03]),
        "train, 25 % supervised": _samples(speed, LoRA=[0.01], L2D=[0.005]),
    }
    result = speed.summarize(samples, unit="cpu", memory={"decode, batch 1": {"other": 3 * 2**20}})
    console = Console(width=200, record=True, file=io.StringIO())
    for table in speed.tables(result):
        console.print(table)
    rows = {line.split()[0]: line.split()[1:] for line in console.export_text().splitlines() if line.split()}
    assert rows["other"] == ["30.0", "15.00", "500", "3"]
    assert rows["L2D"][:2] == ["200.0", "2.00"]
