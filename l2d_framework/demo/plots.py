"""The demo's two pictures; needs matplotlib, the extra `plots`."""

from __future__ import annotations

import importlib.util
import os
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from l2d_framework.demo.findings import Results
from l2d_framework.demo.measure import ADAPTIVE, DEFAULT, EVALUATIONS, FIXED, Denoising
from l2d_framework.demo.scores import Outcome, Sheet, score
from l2d_framework.demo.task import NEW, OLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY, DENOISING = "accuracy_vs_steps.png", "denoising.png"

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
_GREY, _BLACK, _YELLOW = "#666666", "#000000", "#F0E442"
_COLOURS = (_BLUE, _VERMILION, _ORANGE, _PURPLE, _SKY, _BLACK, _YELLOW, _GREY)
_SOLVERS = {FIXED[0]: (_BLUE, "o", -0.03), FIXED[1]: (_VERMILION, "s", 0.03)}


def can_plot() -> bool:
    """Whether matplotlib is installed.

    Returns:
        True if it is.
    """
    return importlib.util.find_spec("matplotlib") is not None


def draw_accuracy(results: Results, path: Path) -> None:
    """Exact match against evaluations, for the new skill and for the old ones.

    Args:
        results: what was measured.
        path: a PNG file.
    """
    figure = _figure(11.0, 5.0)
    panels = figure.subplots(1, 2, sharey=True)
    count = len(results.base.new.questions), len(results.base.old.questions)
    _draw_panel(panels[0], results, "new")
    _draw_panel(panels[1], results, "old")
    panels[0].set_title(f"new skill: {NEW} ({count[0]:,} held-out questions)")
    panels[1].set_title(f"the {len(OLD)} skills of the base model ({count[1]:,} held-out questions)")
    panels[0].set_ylabel("exact match (bars and bands: ± 1 standard error)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _save(figure, path)


def _draw_panel(axes: Axes, results: Results, which: str) -> None:
    for outcome, label, colour, line in (
        (results.base, "base model", _GREY, "--"),
        (results.lora, "LoRA, same updates", _GREEN, "-."),
    ):
        found = score(_sheet(outcome, which).marks)
        axes.axhline(found.mean, color=colour, linestyle=line, linewidth=1.8, label=label)
        axes.axhspan(found.mean - found.error, found.mean + found.error, color=colour, alpha=0.15, linewidth=0)
    for solver, (colour, marker, shift) in _SOLVERS.items():
        points = [results.one, *results.solved(solver)]
        # Slightly apart, so that the error bars of the solvers do not hide each other.
        places = [point.evaluations * (1 + shift) for point in points]
        _errorbar(axes, places, points, which, color=colour, marker=marker, linestyle="-", label=f"L2D, {solver}")
    adaptive = results.solved(ADAPTIVE)
    places = [point.evaluations for point in adaptive]
    style: dict[str, Any] = {
        "color": _BLACK,
        "marker": "D",
        "linestyle": "none",
        "label": f"L2D, {ADAPTIVE} (adaptive, at its mean)",
    }
    _errorbar(axes, places, adaptive, which, zorder=5, **style)
    ticks = [1, *EVALUATIONS]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.85, ticks[-1] * 1.18)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("network evaluations per token (log scale)")
    axes.grid(alpha=0.25)


def _errorbar(axes: Axes, places: list[float], outcomes: list[Outcome], which: str, **style: Any) -> None:
    scores = [score(_sheet(outcome, which).marks) for outcome in outcomes]
    means, errors = [one.mean for one in scores], [one.error for one in scores]
    axes.errorbar(places, means, yerr=errors, capsize=3, linewidth=1.8, markersize=6, **style)


def _sheet(outcome: Outcome, which: str) -> Sheet:
    return outcome.new if which == "new" else outcome.old


def draw_denoisings(denoisings: list[Denoising], path: Path) -> None:
    """Probabilities of the likeliest tokens against time, one panel per answer.

    Args:
        denoisings: answers taking shape.
        path: a PNG file.
    """
    figure = _figure(5.8 * len(denoisings), 4.8)
    panels = figure.subplots(1, len(denoisings), sharey=True, squeeze=False)[0]
    for axes, denoising in zip(panels, denoisings, strict=True):
        _draw_tokens(axes, denoising)
    panels[0].set_ylabel("probability of the answer token")
    figure.suptitle(f"{len(denoisings[0].times)} evaluations with {DEFAULT[0]}", fontsize=11)
    _save(figure, path)


def _draw_tokens(axes: Axes, denoising: Denoising) -> None:
    others = [max(0.0, 1 - sum(column)) for column in zip(*denoising.probabilities, strict=True)]
    axes.plot(denoising.times, others, color=_GREY, linestyle=":", linewidth=1.6, label="all others")
    marks = cycle(zip(_COLOURS, "osv^DPX<", strict=True))
    for token, row in zip(denoising.tokens, denoising.probabilities, strict=True):
        if token == denoising.question.completion:
            right = f"{token.strip()}: right"
            axes.plot(
                denoising.times, row, color=_GREEN, marker="*", markersize=8, linewidth=2.8, label=right, zorder=4
            )
        else:
            colour, marker = next(marks)
            axes.plot(
                denoising.times, row, color=colour, marker=marker, markersize=4, linewidth=1.4, label=token.strip()
            )
    title = "\n".join([*wrap(denoising.chosen, 72), denoising.question.prompt])
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("t, from noise (0: the base model's answer) to data (1: read-out)")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
