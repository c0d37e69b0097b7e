"""Pictures of tables whose paper has a figure; needs matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from l2d_bench.cells import Filled
from l2d_bench.schema import Figure, ProfileFile
from l2d_framework.evaluation import plots

_COLOURS = plots.COLOURS
_MARKERS = "osD^vPX"
_ACROSS = 3
_LETTERS = 14
"""Of a title, per inch."""


def draw(filled: Filled, profile: ProfileFile, path: Path) -> bool:
    """Draw the figure of a table.

    Args:
        filled: the table; it declares a figure.
        profile: the profile.
        path: a PNG file.

    Returns:
        False if there is nothing to draw yet.
    """
    figure = filled.plan.table.figure
    assert figure is not None
    panels = {"lines": _lines, "bars": _bars, "curves": _curves, "heatmap": _heatmaps}[figure.kind](filled, figure)
    if not panels:
        return False
    across = 2 if len(panels) == 4 else min(_ACROSS, len(panels))
    width = 4.6 if across > 1 else 8.0  # inches; a single panel leaves the legend no room
    axes = plots.panels(len(panels), across, (width, 3.3), below=0.6, dpi=130)
    for place, (name, paint) in zip(axes, panels, strict=True):
        paint(place)
        place.set_title(name, fontsize=10)
    canvas: Any = axes[0].figure
    plots.legend_below(canvas, columns=3, fontsize=8)
    title = wrap(f"{filled.plan.table.title} — {profile.title}", int(_LETTERS * width * across))
    canvas.suptitle("\n".join(title), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(canvas, path)
    return True


def _drawn(filled: Filled, figure: Figure) -> list[str]:
    """Columns in which something was measured; those of exact numbers, such as parameters, only if asked for."""
    rows = range(len(filled.plan.rows))
    if figure.columns is not None:
        return [name for name in figure.columns if any(filled.cells[i, name].value is not None for i in rows)]
    return [name for name in filled.plan.columns if any(filled.cells[i, name].error is not None for i in rows)]


def _lines(filled: Filled, figure: Figure) -> list[Any]:
    plan = filled.plan
    series = list(dict.fromkeys(row.series or row.label for row in plan.rows if row.x is not None))
    level = [number for number, row in enumerate(plan.rows) if row.x is None]

    def panel(name: str) -> Any:
        def paint(axes: Any) -> None:
            for index, one in enumerate(series):
                known = sorted(
                    (row.x, value, filled.cells[number, name].error or 0.0)
                    for number, row in enumerate(plan.rows)
                    if row.x is not None and (row.series or row.label) == one
                    if (value := filled.cells[number, name].value) is not None
                )
                if known:
                    plots.points(axes, known, linewidth=1.4, label=one, **_style(index))
            for index, number in enumerate(level):
                cell = filled.cells[number, name]
                if cell.value is not None and len(level) <= len(series) + 4:
                    colour = _COLOURS[index % len(_COLOURS)]
                    axes.axhline(cell.value, ls=":", lw=1.1, color=colour, label=plan.rows[number].label)
            if figure.log_x:
                _log_axis(axes, sorted({row.x for row in plan.rows if row.x is not None}))
            _label(axes, figure, name)

        return paint

    names = [
        n
        for n in _drawn(filled, figure)
        if any(row.x is not None and filled.cells[i, n].value is not None for i, row in enumerate(plan.rows))
    ]
    return [(name, panel(name)) for name in names]


def _bars(filled: Filled, figure: Figure) -> list[Any]:
    plan, names = filled.plan, _drawn(filled, figure)
    rows = [i for i in range(len(plan.rows)) if any(filled.cells[i, name].value is not None for name in names)]
    width = 0.8 / max(1, len(rows))

    def values(axes: Any) -> None:
        for index, number in enumerate(rows):
            cells = [filled.cells[number, name] for name in names]
            heights = [float("nan") if cell.value is None else cell.value for cell in cells]
            errors = [cell.error or 0.0 for cell in cells]
            places = [place + (index - (len(rows) - 1) / 2) * width for place in range(len(names))]
            colour = _COLOURS[index % len(_COLOURS)]
            axes.bar(places, heights, width, yerr=errors, capsize=2, color=colour, label=plan.rows[number].label)
        _ticks(axes, names)
        axes.set_ylabel(figure.y)

    def details(axes: Any) -> None:
        for index, number in enumerate(rows):
            heights = [_detail(filled, number, name, str(figure.detail)) for name in names]
            places = [place + (index - (len(rows) - 1) / 2) * width for place in range(len(names))]
            axes.bar(places, heights, width, color=_COLOURS[index % len(_COLOURS)])
        _ticks(axes, names)

    panels: list[Any] = [(figure.y or "score", values)] if names else []
    return panels + ([(figure.detail.replace("_", " "), details)] if figure.detail and names else [])


def _detail(filled: Filled, number: int, name: str, detail: str) -> float:
    cell = filled.cells[number, name]
    found = [filled.outcomes[key].details.get(detail) for key in cell.jobs if key in filled.outcomes]
    known = [float(value) for value in found if isinstance(value, (int, float))]
    return sum(known) / len(known) if known else float("nan")


def _curves(filled: Filled, figure: Figure) -> list[Any]:
    plan = filled.plan
    found: dict[tuple[str, str], list[tuple[str, int, list[list[float]]]]] = {}
    for number, row in enumerate(plan.rows):
        if figure.rows is not None and row.label not in figure.rows:
            continue
        seen: set[str] = set()
        for name in plan.columns:
            cell = plan.cells[number, name]
            for seed, key in enumerate(cell.jobs):
                for curve, points in filled.outcomes[key].curves.items() if key in filled.outcomes else ():
                    is_wanted = figure.curves is None or curve in figure.curves
                    if is_wanted and (mark := f"{key} {curve}") not in seen:
                        seen.add(mark)
                        measure = str(cell.column.measure) if cell.column else ""
                        found.setdefault((curve, measure), []).append((row.label, seed, points))

    def panel(lines: list[tuple[str, int, list[list[float]]]], curve: str) -> Any:
        def paint(axes: Any) -> None:
            for label, seed, points in lines:
                known = sorted((x, y, error[0] if error else None) for x, y, *error in points)
                index = labels.index(label)
                shown = label if seed == 0 else None
                alpha = 1.0 if seed == 0 else 0.45
                line = ("-", "--", ":")[index // len(_COLOURS) % 3]  # where colours come again
                colour = _COLOURS[index % len(_COLOURS)]
                plots.points(axes, known, ls=line, lw=1.3, alpha=alpha, color=colour, label=shown)
            if figure.log_x:
                _log_axis(axes, sorted({point[0] for _, _, points in lines for point in points}))
            _label(axes, figure, curve)

        return paint

    curves = [curve for curve, _ in found]
    drawn = {label for lines in found.values() for label, _, _ in lines}
    labels = [row.label for row in plan.rows if row.label in drawn]  # of all panels, which share a legend
    panels = []
    for (curve, measure), lines in sorted(found.items(), key=lambda one: curves.index(one[0][0])):
        name = f"{curve}, {measure}" if curves.count(curve) > 1 else curve
        panels.append((figure.titles.get(name, name.replace("_", " ")), panel(lines, curve)))
    return panels


def _heatmaps(filled: Filled, figure: Figure) -> list[Any]:
    plan = filled.plan
    panels = []
    for number, row in enumerate(plan.rows):
        keys = [key for name in plan.columns for key in filled.cells[number, name].jobs if key in filled.outcomes]
        matrix = next((filled.outcomes[key].matrix for key in keys if filled.outcomes[key].matrix), None)
        if matrix:
            panels.append((row.label, _heatmap(matrix, figure)))
    return panels


def _heatmap(matrix: Sequence[Sequence[float]], figure: Figure) -> Any:
    def paint(axes: Any) -> None:
        image = axes.imshow(matrix, aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, shrink=0.85)
        axes.set_xlabel(figure.x)
        axes.set_ylabel(figure.y)

    return paint


def _log_axis(axes: Any, places: Sequence[float]) -> None:
    positive = [place for place in places if place > 0.0]
    if len(positive) == len(places):
        axes.set_xscale("log")
    elif positive:
        axes.set_xscale("symlog", linthresh=positive[0])  # a logarithm that has a place for zero, too
    else:
        return
    axes.set_xticks(places, [f"{place:g}" for place in places], fontsize=8)
    axes.minorticks_off()


def _style(index: int) -> dict[str, Any]:
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def _label(axes: Any, figure: Figure, name: str) -> None:
    axes.set_xlabel(figure.x)
    axes.set_ylabel(figure.y)
    axes.grid(alpha=0.25)


def _ticks(axes: Any, names: Sequence[str]) -> None:
    axes.set_xticks(
        range(len(names)),
        names,
        rotation=30 if len(names) > 3 else 0,
        ha="right" if len(names) > 3 else "center",
        fontsize=8,
    )
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
