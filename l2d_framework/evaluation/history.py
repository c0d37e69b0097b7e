"""What a run logged while it trained, as curves; drawing needs matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2d_framework.config.files import parse_json, read_text
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation import plots
from l2d_framework.training.metrics import BINS
from l2d_framework.training.output_dir import checkpoints, read_card

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STATE = "trainer_state.json"
_MOST = 60
"""Points of a smoothed curve at most, so that it shows where a loss goes rather than how it jumps."""

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class History:
    """Log of a run.

    Attributes:
        entries: lines of the log in order, each with its `step`.
        unit: what its losses are nats of.
    """

    entries: list[dict[str, Any]]
    unit: str

    def curve(self, name: str) -> Points:
        """A logged number by update."""
        return [(entry["step"], entry[name]) for entry in self.entries if entry.get(name) is not None]

    def by_time(self) -> tuple[str, list[tuple[float, float]]]:
        """The last loss in each bin of t and where it was taken: held out if anything was, else in training."""
        for prefix, where in (("eval_", "held out"), ("", "training")):
            last = [self.curve(f"{prefix}loss_t{number:02d}")[-1:] for number in range(BINS)]
            if any(last):
                points = [((number + 0.5) / BINS, found[0][1]) for number, found in enumerate(last) if found]
                return where, points
        return "", []


def read_history(run: Path) -> History:
    """The log of a run, finished or not: of one that still trains, up to its last checkpoint.

    Args:
        run: its output folder.

    Returns:
        The log.

    Raises:
        ConfigError: if the folder is no run's, or nothing is logged there yet.
    """
    card = read_card(run) if run.is_dir() else None
    if card is None:
        raise ConfigError(f"{str(run)!r} is no folder of a run, which holds run.json. Name an output_dir.")
    files = [folder / _STATE for folder in (*checkpoints(run), run)]
    file = next((file for file in reversed(files) if file.is_file()), None)
    if file is None:
        raise ConfigError(f"{str(run)!r} holds no log yet: it comes with the first checkpoint (training.save_steps).")
    try:
        entries = [dict(entry) for entry in parse_json(read_text(file), str(file))["log_history"]]
        logged = [entry for entry in entries if {"loss", "eval_loss"} & entry.keys() and int(entry["step"]) >= 0]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{str(file)!r} is damaged ({error!r}). Name another run.") from error
    return History(logged, "pair" if card.get("kind") == "reward" else "token")


def draw_histories(histories: Mapping[str, History], path: Path) -> None:
    """Loss, loss by t, learning rate and measurements of held-out data of named runs, in one picture."""
    loss, times, rate, held_out = plots.panels(4, 2, (5.5, 3.6), below=0.4)
    places: set[str] = set()
    units = " or ".join(dict.fromkeys(history.unit for history in histories.values()))
    for (name, history), colour in zip(histories.items(), cycle(plots.COLOURS), strict=False):
        points = history.curve("loss")
        smooth = smoothed(points)
        if len(smooth) < len(points):
            loss.plot(*_xy(points), color=colour, alpha=0.25, linewidth=0.8)
        loss.plot(*_xy(smooth), color=colour, linewidth=1.6, marker=_marker(smooth), markersize=4, label=name)
        measured = history.curve("eval_loss")
        loss.plot(*_xy(measured), color=colour, linestyle="--", marker="o", markersize=3)
        held_out.plot(*_xy(measured), color=colour, marker="o", markersize=4)
        where, by_time = history.by_time()
        if by_time:
            places.add(where)
            times.plot(*_xy(by_time), color=colour, marker="o", markersize=4, label=name)
        rates = history.curve("learning_rate")
        rate.plot(*_xy(rates), color=colour, linewidth=1.6, marker=_marker(rates), markersize=4)
    times.set_title(f"last loss by t, {' or '.join(sorted(places))}" if places else "loss by t")
    loss.set_title("loss (dashed: held out)")
    held_out.set_title("held-out loss")
    rate.set_title("learning rate")
    for axes, label in ((loss, "update"), (times, "t (0 noise, 1 data)"), (rate, "update"), (held_out, "update")):
        _frame(axes, label, "" if axes is rate else f"nats per {units}")
        if axes is not times:
            axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    picture: Any = loss.figure
    plots.legend_below(picture, columns=3)
    plots.save(picture, path)


def smoothed(points: Points) -> Points:
    """Means over stretches of updates, each at the last of them; the points themselves where they are few."""
    width = -(-len(points) // _MOST) or 1
    parts = [points[start : start + width] for start in range(0, len(points), width)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _xy(points: list[Any]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _marker(points: Points) -> str:
    # A line of one point cannot be seen.
    return "o" if len(points) == 1 else ""


def _frame(axes: Axes, x: str, y: str) -> None:
    lines: list[Any] = list(axes.lines)
    if not any(len(line.get_xydata()) for line in lines):
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    if not axes.lines:
        axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes, color="grey")
        axes.set_xticks([])
        axes.set_yticks([])
