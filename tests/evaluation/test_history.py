import json
import shutil
from pathlib import Path

import pytest

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.history import History, draw_histories, read_history, smoothed

RUNS = Path(__file__).parents[1] / "models" / "data" / "format2"


@pytest.fixture
def run(tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(RUNS / "l2d_whole", tmp_path / "l2d_whole"))


def test_curves_are_the_numbers_of_the_log():
    history = read_history(RUNS / "l2d_whole")
    log = json.loads((RUNS / "l2d_whole" / "trainer_state.json").read_text())["log_history"]
    assert history.curve("loss") == [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    assert [step for step, _ in history.curve("eval_loss")] == [3, 6, 9]
    result = json.loads((RUNS / "l2d_whole" / "run.json").read_text())["result"]["losses"]
    where, points = history.by_time()
    assert where == "held out"
    expected = {(i + 0.5) / 10: result.get(f"eval_loss_t{i:02d}") for i in range(10)}
    assert dict(points) == {t: value for t, value in expected.items() if value is not None}


def test_an_unfinished_run_is_known_up_to_its_last_checkpoint():
    history = read_history(RUNS / "l2d_stopped")
    assert [step for step, _ in history.curve("loss")] == [1, 2, 3]
    assert history.curve("loss") == read_history(RUNS / "l2d_whole").curve("loss")[:3]


def test_without_held_out_data_the_loss_by_t_is_that_of_training():
    entries = [{"step": 1, "loss": 4.0, "loss_t00": 5.0}, {"step": 2, "loss": 3.0, "loss_t09": 2.0}]
    assert History(entries, "token").by_time() == ("training", [(0.05, 5.0), (0.95, 2.0)])


def test_a_run_that_logged_no_loss_by_t_has_none():
    assert History([{"step": 1, "loss": 4.0}], "pair").by_time() == ("", [])


@pytest.mark.parametrize("count", [0, 1, 60])
def test_few_points_are_not_smoothed(count):
    points = [(step, float(step % 7)) for step in range(count)]
    assert smoothed(points) == points


@pytest.mark.parametrize("count", [61, 600, 1001])
def test_smoothing_keeps_the_mean_and_the_last_update(count):
    points = [(step, float(step % 7)) for step in range(count)]
    smooth = smoothed(points)
    assert len(smooth) <= 60
    assert smooth[-1][0] == count - 1
    steps = [-1, *(step for step, _ in smooth)]
    total = sum(value * (after - before) for (after, value), before in zip(smooth, steps, strict=False))
    assert total == pytest.approx(sum(value for _, value in points))


def test_a_folder_that_is_no_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_history(tmp_path)


def test_a_run_that_has_logged_nothing_says_when_it_will(run):
    (run / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match="first checkpoint"):
        read_history(run)


@pytest.mark.parametrize("content", ["{}", "[1]", "{", '{"log_history": [{"loss": 1}]}', '{"log_history": [3]}'])
def test_a_damaged_log_is_named(run, content):
    (run / "trainer_state.json").write_text(content)
    with pytest.raises(ConfigError, match=r"trainer_state\.json"):
        read_history(run)


def test_every_run_has_a_curve_of_its_own_in_the_picture(l2d_plot, tmp_path):
    axes = l2d_plot({"whole": read_history(RUNS / "l2d_whole"), "stopped": read_history(RUNS / "l2d_stopped")})
    loss, times, rate, held_out = axes
    assert [line.get_xydata().tolist()[-1][0] for line in held_out.lines] == [9, 3]
    assert len(rate.lines) == len(times.lines) == 2
    assert len(loss.lines) == 4
    assert {line.get_color() for line in rate.lines} == {line.get_color() for line in held_out.lines}


@pytest.fixture
def l2d_plot(tmp_path, monkeypatch):
    """Draws histories; returns the panels of the picture."""
    from l2d_framework.evaluation import plots

    drawn = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))

    def draw(histories):
        draw_histories(histories, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
        return drawn[-1].axes

    return draw


def test_a_log_of_one_line_can_be_seen(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    from l2d_framework.evaluation.plots import COLOURS

    draw_histories({"run": History([{"step": 2, "loss": 4.0, "learning_rate": 1e-4}], "token")}, tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")[..., :3]
    wanted = [int(COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    for panel in (pixels[:height, :width], pixels[height : -height // 4, :width]):
        assert (abs(panel - wanted).max(-1) < 0.02).sum() > 10
