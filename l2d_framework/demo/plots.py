"""The demo's two pictures."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from l2d_framework.demo.measure import ADAPTIVE, DEFAULT, EVALUATIONS, FIXED, L2D, LORA, Denoising, Outcome
from l2d_framework.demo.report import Results
from l2d_framework.demo.task import NEW, OLD
from l2d_framework.evaluation import plots
from l2d_framework.evaluation.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCURACY, DENOISING = "accuracy_vs_steps.png", "denoising.png"

_GREY, _YELLOW = "#666666", "#F0E442"
_TOKENS = (BLUE, VERMILION, ORANGE, PURPLE, SKY, BLACK, _YELLOW, _GREY)
_SOLVERS = {FIXED[0]: (BLUE, "o", -0.03), FIXED[1]: (VERMILION, "s", 0.03)}


def draw_accuracy(results: Results, path: Path) -> None:
    """Exact match for the new skill and for the old ones, against evaluations and against updates."""
    figure = plots.figure(11.0, 9.0)
    rows = figure.subplots(2, 2, sharey=True, sharex="row")
    titles = {"new": f"new skill: {NEW}", "old": f"the {len(OLD)} skills of the base model"}
    for column, (which, title) in enumerate(titles.items()):
        _draw_evaluations(rows[0, column], results, which)
        _draw_updates(rows[1, column], results, which)
        rows[0, column].set_title(f"{title} ({len(getattr(results.base, which).questions):,} held-out questions)")
    figure.supylabel("exact match (bars and bands: ± 1 standard error)")
    plots.legend_below(figure, columns=4)
    plots.save(figure, path)


_STYLE: dict[str, Any] = {"capsize": 3, "linewidth": 1.8, "markersize": 6}


def _draw_evaluations(axes: Axes, results: Results, which: str) -> None:
    for outcome, label, colour, line in (
        (results.base, "base model", _GREY, "--"),
        (results.lora, "LoRA, same updates", GREEN, "-."),
    ):
        ((_, height, error),) = _points([outcome], which)
        axes.axhline(height, color=colour, linestyle=line, linewidth=1.8, label=label)
        axes.axhspan(height - error, height + error, color=colour, alpha=0.15, linewidth=0)
    for solver, (colour, marker, shift) in _SOLVERS.items():
        # Slightly apart, so that the error bars of the solvers do not hide each other.
        points = _points([results.one, *results.solved(solver)], which, 1 + shift)
        plots.points(axes, points, color=colour, marker=marker, linestyle="-", label=f"L2D, {solver}", **_STYLE)
    adaptive = {"color": BLACK, "marker": "D", "linestyle": "none", "label": f"L2D, {ADAPTIVE} (adaptive, at its mean)"}
    plots.points(axes, _points(results.solved(ADAPTIVE), which), zorder=5, **_STYLE | adaptive)
    ticks = [1, *EVALUATIONS]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    _frame(axes, (0.85, ticks[-1] * 1.18), "network evaluations per token (log scale), trained to the end")


def _draw_updates(axes: Axes, results: Results, which: str) -> None:
    way = f"{DEFAULT[0]} at {DEFAULT[1]} evaluations"
    for name, colour, marker, label in ((LORA, GREEN, "^", "LoRA"), (L2D, VERMILION, "s", f"L2D, {way}")):
        stops = [(stop.updates, getattr(stop, which).score) for stop in results.learning[name]]
        points = [(float(x), score.value or 0.0, score.standard_error) for x, score in stops]
        plots.points(axes, points, color=colour, marker=marker, linestyle="-", label=f"{label}, as it learns", **_STYLE)
    last = results.learning[L2D][-1].updates
    _frame(axes, (-0.02 * last, 1.02 * last), "updates of the finetuning")


def _points(outcomes: list[Outcome], which: str, shift: float = 1.0) -> list[tuple[float, float, float]]:
    """Evaluations, exact match and standard error, the first times `shift`."""
    scores = [(outcome.evaluations * shift, getattr(outcome, which).score) for outcome in outcomes]
    return [(x, score.value or 0.0, score.standard_error or 0.0) for x, score in scores]


def draw_denoisings(denoisings: list[Denoising], path: Path) -> None:
    """Probabilities of the likeliest tokens against time, one panel per answer."""
    figure = plots.figure(5.8 * len(denoisings), 4.8)
    panels = figure.subplots(1, len(denoisings), sharey=True, squeeze=False)[0]
    for axes, denoising in zip(panels, denoisings, strict=True):
        _draw_tokens(axes, denoising)
    panels[0].set_ylabel("probability of the answer token")
    figure.suptitle(f"{len(denoisings[0].times)} evaluations with {DEFAULT[0]}", fontsize=11)
    plots.save(figure, path)


def _draw_tokens(axes: Axes, denoising: Denoising) -> None:
    others = [max(0.0, 1 - sum(column)) for column in zip(*denoising.probabilities, strict=True)]
    axes.plot(denoising.times, others, color=_GREY, linestyle=":", linewidth=1.6, label="all others")
    marks = cycle(zip(_TOKENS, "osv^DPX<", strict=True))
    for token, row in zip(denoising.tokens, denoising.probabilities, strict=True):
        right = token == denoising.completion
        colour, marker = (GREEN, "*") if right else next(marks)
        style: dict[str, Any] = {"markersize": 4, "linewidth": 1.4}
        if right:
            style = {"markersize": 8, "linewidth": 2.8, "zorder": 4}
        label = f"{token.strip()}: right" if right else token.strip()
        axes.plot(denoising.times, row, color=colour, marker=marker, label=label, **style)
    axes.set_title("\n".join([*wrap(denoising.chosen, 72), denoising.prompt]), fontsize=9)
    _frame(axes, (-0.02, 1.02), "t, from noise (0: the base model's answer) to data (1: read-out)")
    axes.legend(fontsize=8, framealpha=0.9)


def _frame(axes: Axes, across: tuple[float, float], label: str) -> None:
    axes.set(xlim=across, ylim=(-0.02, 1.02), xlabel=label)
    axes.grid(alpha=0.25)
