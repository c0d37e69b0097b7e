"""Metrics of several files side by side: a table, its Markdown and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l2d_framework.evaluation import plots, tables
from l2d_framework.evaluation.statistics import Estimate
from l2d_framework.evaluation.text.measure import AUTHORS, CORRECTED, DEFINITIONS

Results = Mapping[str, dict[str, Any]]
"""What `evaluate_texts` returned, by the name of what was measured."""

_STYLES: dict[str, dict[str, Any]] = {
    AUTHORS: {"color": plots.BLUE, "label": "as the authors define it"},
    CORRECTED: {"color": plots.ORANGE, "hatch": "//", "label": "corrected"},
}


def table(results: Results) -> list[tuple[str, ...]]:
    """A row of headings, then per metric and definition its name, `authors` or `corrected`, and a number per result."""
    rows: list[tuple[str, ...]] = [("metric", "definition", *results)]
    for metric, definitions in DEFINITIONS.items():
        for variant in definitions:
            numbers = [_estimate(result, metric, variant) for result in results.values()]
            if any(numbers):
                rows.append((metric, variant, *(str(one or "-") for one in numbers)))
    return rows


def notes(results: Results) -> list[str]:
    """What the numbers do not cover: samples left out, texts cut short, prefixes read otherwise."""
    said = []
    for name, result in results.items():
        if empty := result["empty_texts"]:
            said.append(f"{name}: {empty:,} of {result['samples']:,} texts are empty.")
        if merged := result["settings"].get("perplexity", {}).get("prefixes_merged_with_text"):
            said.append(
                f"{name}, perplexity: {merged:,} prefixes end in other tokens when the text follows, so that their "
                "difference of NLL is not exactly that of the text."
            )
        left_out: dict[int, list[str]] = {}
        for metric, variants in result["metrics"].items():
            for variant, numbers in variants.items():
                if numbers["left_out"]:
                    left_out.setdefault(numbers["left_out"], []).append(f"{metric} ({variant})")
                if cut := numbers.get("truncated"):
                    longest = result["settings"][metric]["max_length"]
                    said.append(f"{name}, {metric} ({variant}): {cut:,} texts were cut to {longest:,} tokens.")
        for count, where in left_out.items():
            said.append(f"{name}: {count:,} samples do not define and are left out of {', '.join(where)}.")
    return said


def markdown(results: Results, *, picture: str | None) -> str:
    """A report."""
    rows = table(results)
    used = {row[0] for row in rows}
    said = notes(results)
    lines = [
        "# Metrics of generated text",
        "",
        *tables.markdown(rows),
        "",
        "After ± stands the standard error over samples, which are taken as independent.",
        "",
        *(f"* {note}" for note in said),
        *([""] if said else []),
        *([f"![metrics of the files]({picture})", ""] if picture else []),
        "## Definitions",
        "",
        *(
            f"* `{metric}`, {variant}: {text}."
            for metric, definitions in DEFINITIONS.items()
            if metric in used
            for variant, text in definitions.items()
        ),
        "",
        "## Settings",
        "",
        *(f"* {name}: {_settings(result['settings'])}" for name, result in results.items()),
        "",
    ]
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """One panel of bars per metric; needs matplotlib, the extra `plots`."""
    metrics = [metric for metric in DEFINITIONS if any(metric in result["metrics"] for result in results.values())]
    panels = plots.panels(len(metrics), 3, (4.2, 2.8), below=0.5)
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_panel(axes, results, metric)
    figure: Any = panels[0].figure
    plots.legend_below(figure)
    plots.save(figure, path)


def _draw_panel(axes: Any, results: Results, metric: str) -> None:
    width = 0.8 / len(DEFINITIONS[metric])
    for index, variant in enumerate(DEFINITIONS[metric]):
        numbers = [_estimate(result, metric, variant) for result in results.values()]
        known = {place: one for place, one in enumerate(numbers) if one and one.value is not None}
        shift = (index - (len(DEFINITIONS[metric]) - 1) / 2) * width
        errors = [math.nan if one.standard_error is None else one.standard_error for one in known.values()]
        style = {"yerr": errors, "capsize": 3, "edgecolor": "white", "ecolor": "#333333", **_STYLES[variant]}
        axes.bar([place + shift for place in known], [one.value for one in known.values()], width, **style)
    axes.set_title(metric, fontsize=10)
    axes.set_xticks(range(len(results)), list(results), rotation=0 if len(results) < 4 else 30, fontsize=8)
    axes.set_xlim(-0.6, len(results) - 0.4)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _estimate(result: dict[str, Any], metric: str, variant: str) -> Estimate | None:
    numbers = result["metrics"].get(metric, {}).get(variant)
    return None if numbers is None else Estimate(**numbers)


def _settings(settings: dict[str, Any]) -> str:
    parts = [f"tokens of {settings['tokens']}" if settings["tokens"] != "words" else "white-space words as tokens"]
    if judge := settings.get("perplexity"):
        parts.append(f"perplexity under `{judge['model']}`, texts begun with `{judge['first_token']}`")
    if features := settings.get("mauve"):
        parts.append(f"MAUVE on features of `{features['features']}`, at most {features['max_length']} tokens")
    return "; ".join(parts)
