"""A diagnosis in words, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l2d_framework.evaluation import plots
from l2d_framework.evaluation.statistics import Estimate

Diagnosis = Mapping[str, Any]
"""What `diagnose` returned."""

_CURVES: dict[str, dict[str, Any]] = {
    "network": {"color": plots.BLUE, "marker": "o", "label": "network"},
    "combination": {"color": plots.VERMILION, "marker": "s", "label": "its first prediction with the exact hint"},
    "combination_after_first_move": {"color": plots.ORANGE, "marker": "^", "label": "its second with the exact hint"},
}


def sentences(diagnosis: Diagnosis) -> list[str]:
    """A sentence or two per question, the answer to "will more steps help?" first."""
    first, later = diagnosis["gain"]["over_combination"], diagnosis["gain"]["over_combination_after_first_move"]
    answers = diagnosis["answers"]
    lines = [
        f"Will evaluations after the first help? {_verdict(first)}: {_estimate(first)} nats per token over the "
        "network's first prediction with the exact hint.",
        f"And more of them, once it has moved? {_verdict(later)}: {_estimate(later)} nats per token over its second "
        "prediction with the exact hint.",
        f"Tokens that differ from those of the {answers['base']}: {_share(answers['differs'])}. "
        f"Right before: {_share(answers['base_right'])}; after: {_share(answers['right'])}.",
        f"Tokens settled: {_settling(diagnosis['settled'])}.",
    ]
    if (spent := diagnosis["evaluations"]) is not None:
        cost = spent.get("failed") or f"{spent['mean']:.1f} evaluations a token on average, 95 % at most {spent['p95']}"
        lines.append(f"Adaptive solver {spent['solver']['name']}: {cost}.")
    return lines


def _verdict(gain: Mapping[str, Any]) -> str:
    if gain["verdict"] != "not clear":
        return f"The network {gain['verdict']}"
    return "It is not clear, " + (
        "a single row has no standard error" if gain["standard_error"] is None else "within 2 standard errors"
    )


def _settling(points: list[dict[str, Any]]) -> str:
    first = {share: next(p["t"] for p in points if p["share"]["value"] >= share) for share in (0.5, 0.9, 0.99)}
    return ", ".join(f"{share:.0%} by t = {t:.2f}" for share, t in first.items())


def table(diagnosis: Diagnosis) -> list[tuple[str, ...]]:
    """Cross-entropies by time."""
    heading = ("t", "network", "first prediction + hint", "second prediction + hint")
    return [heading] + [
        (f"{point['t']:.2f}", *(_estimate(point[name]) if name in point else "" for name in _CURVES))
        for point in diagnosis["cross_entropy"]
    ]


def _estimate(numbers: Mapping[str, Any]) -> str:
    return str(Estimate(numbers["value"], numbers["standard_error"], numbers["samples"]))


def _share(numbers: Mapping[str, Any]) -> str:
    error = numbers["standard_error"]
    return f"{numbers['value']:.1%}" + ("" if error is None else f" ± {error:.1%}")


def draw(diagnosis: Diagnosis, path: Path) -> None:
    """Cross-entropies, settling and cost, side by side."""
    spent = diagnosis["evaluations"]
    has_histogram = spent is not None and "histogram" in spent
    figure = plots.figure(14 if has_histogram else 10, 4.6)
    panels = figure.subplots(1, 3 if has_histogram else 2)
    _draw_curves(panels[0], diagnosis)
    points, axes = diagnosis["settled"], panels[1]
    plots.points(axes, [_point(point, "share") for point in points], color=plots.GREEN, marker="o")
    axes.set_title(f"tokens that have settled, {len(points)} evaluations", fontsize=10)
    axes.set(xlabel="t of the evaluation", ylabel="share of tokens", ylim=(-0.02, 1.05))
    axes.grid(alpha=0.25)
    if has_histogram:
        _draw_histogram(panels[2], spent)
    plots.save(figure, path)


def _draw_curves(axes: Any, diagnosis: Diagnosis) -> None:
    for name, style in _CURVES.items():
        plots.points(axes, [_point(entry, name) for entry in diagnosis["cross_entropy"] if name in entry], **style)
    gain = diagnosis["gain"]
    verdicts = [gain[name]["verdict"] for name in ("over_combination", "over_combination_after_first_move")]
    axes.set_title(f"after the first evaluation: {verdicts[0]}\nonce it has moved: {verdicts[1]}", fontsize=10)
    axes.set(xlabel="t, from noise (0) to data (1)", ylabel="cross-entropy, nats per token (± standard error)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9)


def _point(entry: Mapping[str, Any], name: str) -> tuple[float, float, float | None]:
    return entry["t"], entry[name]["value"], entry[name]["standard_error"]


def _draw_histogram(axes: Any, spent: Mapping[str, Any]) -> None:
    counts = spent["histogram"]
    axes.bar(list(counts), list(counts.values()), color=plots.SKY, edgecolor="white", width=0.9)
    axes.axvline(spent["mean"], color=plots.BLACK, linestyle="--", label=f"mean {spent['mean']:.1f}")
    axes.axvline(spent["p95"], color=plots.PURPLE, linestyle=":", label=f"95 % at most {spent['p95']}")
    axes.set_title(f"cost with {spent['solver']['name']}", fontsize=10)
    axes.set(xlabel="network evaluations per token", ylabel="tokens")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9)
