"""`l2d eval-steps`: held-out tokens after each number of evaluations, held against other ways to find the same."""

import io
import json
import sys

import pytest
import torch
from diffusion_models import random_tokens, shared_lm, shared_tess
from rich.console import Console
from typer.testing import CliRunner

from l2d_framework.cli import app, main
from l2d_framework.errors import ConfigError, L2DError
from l2d_framework.evaluation.diagnosis.diagnose import Settings, diagnose, time_grid
from l2d_framework.evaluation.diagnosis.steps import eval_steps, sentences, table
from l2d_framework.evaluation.tables import terminal
from l2d_framework.models import checkpoint

ROWS = [
    {
        "input_ids": random_tokens(1, length, seed=number)[0].tolist(),
        "supervised": [False] * 3 + [True] * (length - 3),
        "class_id": -1,
        "index": number,
    }
    for number, length in enumerate((9, 5, 12, 7))
]


def measured(model, *steps, batch_size=2, **options):
    settings = [model.sampling(num_inference_steps=count, **{"solver": "euler"} | options) for count in steps]
    return eval_steps(model, ROWS, settings, batch_size=batch_size)


def numbers(found):
    return [value for entry in found["settings"] for value in (*entry["by_row"]["right"], *entry["by_row"]["nll"])]


def test_without_evaluations_it_is_the_language_model():
    model = shared_lm()
    (entry,) = measured(model, 0)["settings"]
    for row, right, nll in zip(ROWS, entry["by_row"]["right"], entry["by_row"]["nll"], strict=True):
        tokens = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logarithms = model.backbone.lm(tokens).logits[:, 2:-1].log_softmax(-1)
        assert nll == pytest.approx(-logarithms.gather(-1, tokens[:, 3:, None]).sum().item(), abs=1e-3)
        assert right == (logarithms.argmax(-1) == tokens[:, 3:]).sum()
    assert entry["evaluations"]["value"] == 0


@pytest.mark.parametrize("model", [shared_lm, shared_tess])
def test_no_number_depends_on_the_batch(model):
    solver = {} if model is shared_lm else {"solver": "renoise"}
    together, alone = (measured(model(), 1, 3, batch_size=size, **solver) for size in (4, 1))
    assert numbers(together) == pytest.approx(numbers(alone), abs=1e-3)


def test_it_sees_what_a_diagnosis_sees():
    model = shared_lm()
    sampling = model.sampling(num_inference_steps=5, solver="midpoint")
    other = diagnose(model, ROWS, Settings(time_grid(model.schedule, 3), sampling, None), batch_size=2)
    plain, entry = measured(model, 0, 5, solver="midpoint")["settings"]
    assert entry["accuracy"] == other["answers"]["right"]
    assert plain["accuracy"] == other["answers"]["base_right"]
    assert entry["evaluations"]["value"] == 5


def test_what_evaluations_add_is_the_difference_of_what_they_reach():
    found = measured(shared_lm(), 0, 1, 2, 5)
    plain, first, second, third = found["settings"]
    assert "over_fewer" not in first
    for name in ("accuracy", "nll"):
        for entry, before in ((second, first), (third, second)):
            assert entry["over_fewer"][name]["value"] == pytest.approx(entry[name]["value"] - before[name]["value"])
        gain = third["over_language_model"][name]["value"]
        assert gain == pytest.approx(third[name]["value"] - plain[name]["value"])
    assert len(table(found)) == 5


def results(*rights, losses=None):
    """A result of rows of one token, right or not after 1, 2, 3 ... evaluations."""
    rights = [list(map(int, right)) for right in rights]
    losses = losses or [[1.0] * len(rights[0])] * len(rights)
    settings = [
        {"solver": "euler", "evaluations": {"value": number}, "by_row": {"right": right, "nll": loss}}
        for number, (right, loss) in enumerate(zip(rights, losses, strict=True), 1)
    ]
    return {"settings": settings, "tokens_by_row": [1] * len(rights[0])}


@pytest.mark.parametrize(
    ("rights", "said"),
    [
        (["0000111100", "0000111101", "0000111100"], "no difference seen between 1 and 3"),
        (
            ["0000000000", "1111111100", "1111111101"],
            "better by 80 ± 13 points from 1 to 2, no difference seen between 2 and 3",
        ),
        (
            ["0000000000", "1111111100", "0001000000"],
            "better by 80 ± 13 points from 1 to 2, worse by 70 ± 15 points from 2 to 3",
        ),
        (["1111111111", "1111111111", "0000000011"], "worse by 80 ± 13 points from 1 to 3"),
        (["0", "1"], "no difference seen between 1 and 2"),
    ],
)
def test_a_verdict_needs_a_difference_beyond_its_error(rights, said):
    (line,) = sentences(results(*rights))
    assert (
        line
        == f"Do evaluations pay? euler: accuracy {said}; likelihood no difference seen between 1 and {len(rights)}."
    )


def test_a_loss_that_falls_by_less_than_its_error_is_no_gain():
    rows = torch.rand(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (rows[1] - rows[1].mean()) * 1e-3
    for change, said in ((1e-5, "no difference seen"), (0.1, "better by 0.100000 ± 0.000020 nats")):
        losses = [rows[0].tolist(), (rows[0] + noise - change).tolist()]
        assert f"likelihood {said}" in sentences(results("1" * 200, "1" * 200, losses=losses))[0]


def run(model, *arguments):
    arguments = [str(model), *map(str, arguments)]
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["eval-steps", *arguments], catch_exceptions=False)


def settings_of(out):
    found = json.loads((out / "steps.json").read_text())["settings"]
    return [(entry["solver"], entry["num_inference_steps"]) for entry in found]


def test_every_solver_makes_the_numbers_that_it_can(folders, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep" / "out"
    solvers = ("--solver", "euler", "--solver", "midpoint", "--solver", "fehlberg2")
    data = ("--data", folders / "sums.jsonl", "--limit", 4)
    shown = run(folders / "l2d", *data, *solvers, "--num-inference-steps", "3,0,2", "--out", out)
    assert shown.exit_code == 0, shown.output
    assert sorted(path.name for path in out.iterdir()) == ["steps.json", "steps.png"]
    assert settings_of(out) == [(None, 0), ("euler", 2), ("euler", 3), ("midpoint", 3), ("fehlberg2", None)]
    assert "Do evaluations pay? euler" in shown.stdout


def test_models_without_diffusion_and_without_a_language_model_are_measured_too(folders, tmp_path):
    data = ("--data", folders / "sums.jsonl", "--limit", 2, "--num-inference-steps", "0,1,2")
    for name, settings in (("base", [(None, 0)]), ("tess", [("renoise", 1), ("renoise", 2)])):
        assert run(folders / name, *data, "--out", tmp_path / name).exit_code == 0
        assert settings_of(tmp_path / name) == settings


def test_rows_that_are_cut_to_nothing_are_left_out_and_told(folders, tmp_path, caplog):
    rows = [{"prompt": "x" * count, "completion": "yes"} for count in (2, 60, 70)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = run(folders / "l2d", "--data", data, "--max-length", 40, "--num-inference-steps", "1")
    assert shown.exit_code == 0, shown.output
    assert "in 1 rows, the true ones before given; float32" in shown.stdout
    assert "left out 2 of 3 examples" in caplog.text


def test_numbers_that_a_solver_cannot_make_are_named_with_the_reason_where_they_were_asked_for(folders):
    data = ("--data", folders / "sums.jsonl", "--limit", 2, "--solver", "midpoint")
    said = run(folders / "l2d", *data, "--num-inference-steps", "1,2,3").stderr
    assert "Left out: Solver 'midpoint' makes 2 evaluations a step and one read-out, so it cannot use" in said
    assert said.count("Left out") == 1
    assert "Left out" not in run(folders / "l2d", *data).stderr


def test_a_missing_file_is_all_that_is_said(folders, monkeypatch, capsys):
    steps = ("--num-inference-steps", "1,2,3", "--solver", "midpoint")
    with pytest.raises(L2DError, match="nosuch"):
        run(folders / "l2d", "--data", "nosuch.jsonl", *steps)
    monkeypatch.setattr(sys, "argv", ["l2d", "eval-steps", str(folders / "l2d"), "--data", "nosuch.jsonl", *steps])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("Error: ")


def test_the_table_of_the_usual_settings_fits_a_usual_terminal():
    value = {"value": 0.56123, "standard_error": 0.0042, "samples": 500}
    change = {"value": -0.01234, "standard_error": 0.0012, "samples": 500}
    entry = {"solver": "midpoint", "evaluations": {"value": 31}, "accuracy": value, "nll": value | {"value": 3.2123}}
    entry["over_fewer"] = {"accuracy": change, "nll": change}
    screen = io.StringIO()
    Console(file=screen, width=80).print(terminal(table({"settings": [entry]}), "12,345 held-out tokens"))
    assert screen.getvalue().count("31 midpoint") == 1
    assert "56.12±0.42" in screen.getvalue() and "-0.0123±0.0012" in screen.getvalue()


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("l2d", ("--num-inference-steps", "1,two"), ConfigError, "whole numbers"),
        ("l2d", ("--num-inference-steps", "-1"), ConfigError, "whole numbers"),
        ("l2d", ("--num-inference-steps", ""), ConfigError, "whole numbers"),
        ("l2d", ("--num-inference-steps", "2,4", "--solver", "midpoint"), ConfigError, "3 or 5"),
        ("l2d", ("--solver", "midpiont"), L2DError, "did you mean 'midpoint'"),
        ("base", ("--num-inference-steps", "1,2"), L2DError, "no diffusion checkpoint"),
        ("tess", ("--num-inference-steps", "0"), ConfigError, "does not contain"),
        ("l2d", ("--set", "guidance=[{name: classifier_free, scale: 3}]"), ConfigError, "Add --class-column"),
        ("l2d", ("--out", "."), ConfigError, "is not empty"),
    ],
)
def test_mistakes_are_found_before_weights_are_loaded(folders, monkeypatch, model, options, error, message):
    def fail(*args, **options):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(checkpoint, "load_language_model", fail)
    monkeypatch.chdir(folders)
    with pytest.raises(error, match=message):
        run(folders / model, "--data", folders / "sums.jsonl", *options)
