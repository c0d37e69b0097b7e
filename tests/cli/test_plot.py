from pathlib import Path

import pytest

from l2d_framework.errors import install

RUNS = Path(__file__).parents[1] / "models" / "data" / "format2"


def test_runs_are_drawn_into_one_picture(l2d, tmp_path):
    code, out, err = l2d("plot", RUNS / "l2d_whole", RUNS / "tess_stopped", "--out", tmp_path / "a.png")
    assert code == 0, err
    assert str(tmp_path / "a.png") in out.replace("\n", "")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["whole", "--out", "there.png"], "exists"),
        (["whole", "--out", "a.pdf"], "must end in .png"),
        (["whole", "--out", "nowhere/a.png"], "missing or cannot be written"),
        (["whole", "whole", "--out", "a.png"], "named twice"),
        ([".", "--out", "a.png"], "is no folder of a run"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_overwritten(l2d, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("there.png").write_text("mine")
    code, _, err = l2d("plot", *(RUNS / "l2d_whole" if argument == "whole" else argument for argument in arguments))
    assert code == 2
    assert message in err
    assert Path("there.png").read_text() == "mine"
    assert not Path("a.png").exists()


def test_without_matplotlib_the_extra_is_named(l2d, tmp_path, monkeypatch):
    monkeypatch.setattr("l2d_framework.evaluation.plots.can_plot", lambda: False)
    code, _, err = l2d("plot", RUNS / "l2d_whole", "--out", tmp_path / "a.png")
    assert code == 2
    assert install("l2d-framework[plots]") in err
