"""`l2d diagnose`: table, numbers and picture from a checkpoint and held-out rows; mistakes before weights."""

import json

import pytest
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.errors import ConfigError, DataError, L2DError
from l2d_framework.models import checkpoint

FAST = ("--times", 4, "--num-inference-steps", 3, "--limit", 6)


def run(model, *arguments):
    arguments = [str(model), *map(str, arguments)]
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["diagnose", *arguments], catch_exceptions=False)


def test_a_diagnosis_is_shown_and_written_in_one_piece(folders, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep" / "out"
    shown = run(folders / "l2d", "--data", folders / "sums.jsonl", "--class-column", "kind", *FAST, "--out", out)
    assert shown.exit_code == 0, shown.output
    assert sorted(path.name for path in out.iterdir()) == ["diagnosis.json", "diagnosis.png"]
    found = json.loads((out / "diagnosis.json").read_text())
    assert found["rows"] == 6
    assert found["model"]["components"]["backbone"]["num_classes"] == 2
    assert found["sampling"]["num_inference_steps"] == 3
    assert found["data"][0]["path"] == str(folders / "sums.jsonl")
    assert found["gain"]["over_combination"]["verdict"] in shown.stdout
    assert f"{found['cross_entropy'][0]['network']['value']:.1f}" in shown.stdout
    assert found["evaluations"]["solver"]["name"] == "fehlberg2"
    again = tmp_path / "again"
    options = ("--batch-size", 1, "--adaptive-solver", "none", "--out", again)
    run(folders / "l2d", "--data", folders / "sums.jsonl", "--class-column", "kind", *FAST, *options)
    other = json.loads((again / "diagnosis.json").read_text())
    assert other["evaluations"] is None
    assert other["gain"]["over_combination"]["value"] == pytest.approx(
        found["gain"]["over_combination"]["value"], abs=1e-4
    )


def test_rows_of_every_format_from_several_sources_are_read(folders, tmp_path):
    out = tmp_path / "out"
    data = ("--data", folders / "sums.jsonl", "--data", folders / "chats.jsonl")
    assert run(folders / "l2d", *data, *FAST, "--out", out).exit_code == 0
    assert json.loads((out / "diagnosis.json").read_text())["rows"] == 9
    assert run(folders / "l2d", "--data", folders / "texts.jsonl", "--columns", "text=story", *FAST).exit_code == 0


def test_one_row_has_no_standard_error(folders):
    shown = run(folders / "l2d", "--data", folders / "sums.jsonl", *FAST, "--limit", 1)
    assert "a single row has no standard error" in shown.stdout


def test_a_model_that_denoises_whole_answers_has_no_adaptive_solve(folders, tmp_path):
    out = tmp_path / "out"
    shown = run(folders / "tess", "--data", folders / "sums.jsonl", *FAST, "--out", out)
    assert shown.exit_code == 0, shown.output
    found = json.loads((out / "diagnosis.json").read_text())
    assert found["evaluations"] is None
    assert found["answers"]["base"] == "first evaluation"


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        ("base", "sums", (), ConfigError, "plain language model"),
        ("silent", "sums", (), ConfigError, "has no tokenizer"),
        ("nowhere", "sums", (), ConfigError, "There is no folder"),
        ("l2d", "nowhere", (), DataError, "no file or folder"),
        ("l2d", "empty", (), DataError, "has a supervised token"),
        ("l2d", "texts", (), DataError, "no recognisable format"),
        ("l2d", "sums", ("--columns", "prompt"), ConfigError, "OURS=THEIRS"),
        ("l2d", "sums", ("--columns", "question=prompt"), ConfigError, "columns"),
        ("l2d", "sums", ("--max-length", 100_000), ConfigError, "model's context"),
        ("l2d", "sums", ("--solver", "fehlberg2"), ConfigError, "fixed grid"),
        ("l2d", "sums", ("--solver", "midpoint", "--num-inference-steps", 4), ConfigError, "3 or 5"),
        ("l2d", "sums", ("--solver", "midpiont"), L2DError, "did you mean 'midpoint'"),
        ("l2d", "sums", ("--adaptive-solver", "euler"), ConfigError, "does not choose"),
        (
            "l2d",
            "sums",
            ("--set", "guidance=[{name: classifier_free, scale: 3}]"),
            ConfigError,
            "Add --class-column",
        ),
        ("l2d", "sums", ("--adaptive-solver", "nonesuch"), L2DError, "nonesuch"),
        ("l2d", "sums", ("--dtype", "int8"), ConfigError, "--dtype"),
        ("l2d", "sums", ("--device", "nowhere"), ConfigError, "cannot be used here"),
        ("l2d", "sums", ("--out", "."), ConfigError, "is not empty"),
    ],
)
def test_mistakes_are_found_before_weights_are_loaded(folders, monkeypatch, model, data, options, error, message):
    def fail(*args, **options):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(checkpoint, "load_language_model", fail)
    monkeypatch.chdir(folders)
    with pytest.raises(error, match=message):
        run(folders / model, "--data", folders / f"{data}.jsonl", *options)
