"""The declared tables, the profiles and the papers' numbers fit together."""

from functools import cache

import pytest

pytest.importorskip("lm_eval")

from l2d_bench.bench import Bench
from l2d_bench.cells import Filled
from l2d_bench.files import (
    bench_folder,
    own_table_ids,
    paper_numbers,
    paper_value,
    profile_names,
    read_profile,
    read_table,
    table_ids,
)
from l2d_bench.jobs import ModelJob
from l2d_bench.report import printed
from l2d_framework.config.files import read_file
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.code.sandbox import CONSENT

SIX = ["GSM8K", "MATH", "HumanEval pass@10", "MBPP pass@10", "MMLU", "MMLU-Pro"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """`planned(profile)`: every table at the size of a profile."""
    return cache(lambda profile: Bench(table_ids(), profile, tmp_path_factory.mktemp("out")))


def has_a_table_of_its_own(profile):
    file = bench_folder() / "profiles" / f"{profile}.yaml"
    like = read_file(file).get("like", profile) if file.is_file() else profile
    return f"own/{like}" in own_table_ids()


@pytest.mark.parametrize("profile", [name for name in profile_names() if not has_a_table_of_its_own(name)])
def test_every_table_fits_every_profile(profile, planned):
    bench = planned(profile)
    assert [plan.id for plan in bench.plans] == table_ids()
    for plan in bench.plans:
        assert plan.table.figure is None or set(plan.table.figure.columns or ()) <= set(plan.columns)
        assert {(number, name) for number in range(len(plan.rows)) for name in plan.columns} <= plan.cells.keys()
    assert list(bench.out.iterdir()) == []


def test_where_everything_can_be_had_every_model_of_the_papers_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("l2d_framework.evaluation.hub._is_on_hub", lambda name, kind: True)
    monkeypatch.setattr("l2d_framework.evaluation.text.mauve_score.check_installed", lambda: None)
    monkeypatch.setenv(CONSENT, "1")
    bench = Bench(table_ids(), "paper", tmp_path)
    trained = {
        job.title.removeprefix("train ").split(",")[0] for job in bench.jobs.values() if isinstance(job, ModelJob)
    }
    assert trained == {name for name, model in read_profile("paper").models.items() if model.run is not None}
    missing = {
        (plan.id, name) for plan in bench.plans for (_, name), cell in plan.cells.items() if cell.reason == "no data"
    }
    assert missing == set()


def test_a_profile_like_another_says_only_what_is_different(tmp_path):
    full, short = read_profile("smollm2"), read_profile("smollm2_cpu")
    assert short.models.keys() == full.models.keys() and short.data == full.data
    for name, model in short.models.items():
        if model.run is not None:
            assert model.set.items() > full.models[name].set.items()
            assert model.set["training.max_steps"] == 64
    assert short.measures["steps"] == full.measures["steps"] | short.measures["steps"]
    assert (short.device, full.device, short.dtype) == ("cpu", "cuda", full.dtype)
    assert Bench(["own/smollm2"], "smollm2_cpu", tmp_path).plans
    (tmp_path / "lost.yaml").write_text("like: nobody\n")
    with pytest.raises(ConfigError, match=r"`like` is no declared profile .* got 'nobody', known are .*'smollm2'"):
        read_profile(str(tmp_path / "lost.yaml"))


def test_profiles_that_are_like_each_other_are_refused(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    for name, like in {"first": "second", "second": "first", "own": "own"}.items():
        (tmp_path / "profiles" / f"{name}.yaml").write_text(f"like: {like}\n")
    monkeypatch.setattr("l2d_bench.files.bench_folder", lambda: tmp_path)
    for name in ("first", "own", str(tmp_path / "profiles" / "own.yaml")):
        with pytest.raises(ConfigError, match="`like` leads in a circle"):
            read_profile(name)


def test_code_that_models_write_runs_only_with_consent(tmp_path, monkeypatch):
    monkeypatch.setattr("l2d_framework.evaluation.hub._is_on_hub", lambda name, kind: True)
    monkeypatch.delenv(CONSENT, raising=False)
    (plan,) = Bench(["l2d_table13"], "paper", tmp_path).plans
    refused = {name for (_, name), cell in plan.cells.items() if "--confirm-run-unsafe-code" in (cell.text or "")}
    assert {"HumanEval pass@10", "MBPP pass@10"} <= refused and "GSM8K" not in refused


def test_rows_and_columns_carry_the_papers_names():
    seen = {}
    for name in table_ids():
        table = read_table(name)
        rows = [row.label for row in table.rows if row.sweep is None]
        columns = [table.paper_columns.get(column, column) for column in table.columns]
        for key in table.paper:
            printed = paper_numbers()[key]
            theirs = [row["row"] for row in printed["rows"]]
            across = printed["columns"]
            assert (across, theirs) == (rows, columns) if table.transposed else theirs == rows
            assert table.transposed or set(across) <= set(columns)
            seen[key] = name
    assert seen.keys() == paper_numbers().keys()


@pytest.mark.parametrize(
    "key", [k for k, v in paper_numbers().items() if "All tasks" in v["columns"] and k != "l2d.table2"]
)
def test_all_tasks_is_the_mean_of_the_six(key):
    printed = paper_numbers()[key]
    for row in printed["rows"]:
        values = dict(zip(printed["columns"], row["values"], strict=True))
        if any(values[name] is None for name in SIX):
            continue
        # Each of the six and the mean are rounded to two digits.
        assert values["All tasks"] == pytest.approx(sum(values[name] for name in SIX) / 6, abs=0.0101), row["row"]


def test_the_summary_table_averages_the_table_per_task():
    whole, summary = paper_numbers()["l2d.table14"], paper_numbers()["l2d.table2"]
    for long, short in zip(whole["rows"], summary["rows"], strict=True):
        values = dict(zip(whole["columns"], long["values"], strict=True))
        math, coding, everything, _ = short["values"]
        assert long["row"] == short["row"] and everything == values["All tasks"]
        assert math == pytest.approx((values["GSM8K"] + values["MATH"]) / 2, abs=0.0101)
        assert coding == pytest.approx((values["HumanEval pass@10"] + values["MBPP pass@10"]) / 2, abs=0.0101)


def test_both_rows_of_the_velocity_table_anneal_linearly(tmp_path, monkeypatch):
    monkeypatch.setattr("l2d_framework.evaluation.hub._is_on_hub", lambda name, kind: True)
    plan = Bench(["l2d_table9"], "paper", tmp_path).plans[0]
    modes = []
    for number in (1, 2):
        (key,) = plan.cells[number, "GSM8K"].jobs
        estimate = plan.jobs[key].identity["options"]["sampling"]["estimate"]
        assert estimate["temperature"] == {"name": "polynomial", "power": 1.0, "end": 1.0}
        modes.append(estimate["mode"])
    assert modes == ["sample", "average"]


def test_the_paper_prints_what_the_table_shows_beside():
    assert paper_value(read_table("l2d_table1"), "Llama 3.2 1B Instruct + L2D", "GSM8K") == 38.86
    assert paper_value(read_table("l2d_table2"), "token search", "Math") == 27.76
    assert paper_value(read_table("tess_table1"), "RoBERTa", "perplexity") == 20.2
    assert paper_value(read_table("tess_table3"), "TESS 2 v0.3", "GSM8K (TESS 2)") == 36.5
    assert paper_value(read_table("l2d_figure3"), "t = 1", "GSM8K") is None


@pytest.mark.parametrize("profile", ["tiny", "paper"])
def test_what_a_paper_prints_is_shown_beside_the_cells_or_below(profile, planned):
    for plan in planned(profile).plans:
        filled = Filled(plan, {}, {}, {})
        below = {text for _, rows in printed(filled) for row in rows for text in row}
        shown = {plan.table.paper_columns.get(name, name) for name in plan.columns} | below
        for key in plan.table.paper:
            theirs = paper_numbers()[key]
            assert shown >= {*([row["row"] for row in theirs["rows"]] if plan.table.transposed else theirs["columns"])}
