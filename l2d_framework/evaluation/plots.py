"""What all pictures share; matplotlib, the extra `plots`, is imported when one is drawn."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2d_framework.errors import install
from l2d_framework.writing import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
)  # fmt: skip
INSTALL = f"Run: {install('l2d-framework[plots]')}"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def figure(width: float, height: float, *, dpi: int = 150) -> Figure:
    """An empty picture, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def panels(count: int, across: int, size: tuple[float, float], *, below: float, dpi: int = 150) -> list[Axes]:
    """Panels of a new picture, row by row; `size` of each and the room `below` for a legend in inches."""
    down = -(-count // across)
    drawn = figure(size[0] * across, size[1] * down + below, dpi=dpi)
    places = list(drawn.subplots(down, across, squeeze=False).flat)
    for place in places[count:]:
        place.set_axis_off()
    return places[:count]


def legend_below(drawn: Figure, *, columns: int | None = None, **style: Any) -> None:
    """One legend for all panels of a picture, each label once; in one row unless `columns` says otherwise."""
    handles: dict[str, Any] = {}
    for place in drawn.axes:
        handles |= {text: handle for handle, text in zip(*place.get_legend_handles_labels(), strict=True)}
    if handles:
        columns = min(columns or len(handles), len(handles))
        drawn.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, **style)


def points(axes: Axes, drawn: Iterable[tuple[float, float, float | None]], **style: Any) -> None:
    """Points (x, y, standard error) with error bars, if any has one, joined by a line."""
    x, y, errors = zip(*drawn, strict=True)
    bars = [error or 0.0 for error in errors] if any(errors) else None
    axes.errorbar(x, y, yerr=bars, **{"markersize": 4, "capsize": 2, **style})


def save(drawn: Figure, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    picture = io.BytesIO()
    drawn.savefig(picture, format="png")
    write_whole(path, picture.getvalue())
