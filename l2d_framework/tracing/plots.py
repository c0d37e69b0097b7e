"""A trace as heat maps; needs matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation import plots
from l2d_framework.tracing.maps import maps
from l2d_framework.tracing.record import Trace
from l2d_framework.tracing.texts import token_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELLED = 60
"""Most positions whose tokens are written below the map."""

_PROMPT = 12
_LETTERS = 12
_FONT = "DejaVu Sans"


def check_plots() -> None:
    """Refuse to draw without matplotlib.

    Raises:
        ConfigError: if it is not installed.
    """
    if not plots.can_plot():
        raise ConfigError(f"Heat maps need matplotlib. {plots.INSTALL}")


def draw_trace(trace: Trace, tokenizer: PreTrainedTokenizerBase, path: Path, *, title: str = "") -> None:
    """Confidence, probability of the final token, entropy, gap and divergence over evaluations and positions.

    Of a long prompt only the last 12 tokens are shown.

    Args:
        trace: what happened.
        tokenizer: the model's.
        path: a PNG file.
        title: line above the maps.
    """
    from matplotlib.colors import Normalize, SymLogNorm

    found, start = maps(trace), _first_shown(trace)
    count = len(trace.tokens) - start
    share = Normalize(0, 1)
    panels: list[tuple[str, NDArray[Any], str, Normalize]] = [
        ("confidence: probability of the likeliest token", found.confidence, "viridis", share),
        ("probability of the final token" + _bound(trace), found.final, "viridis", share),
        ("entropy (nats)", found.entropy, "magma", Normalize(0, _top(found.entropy))),
        ("gap: first minus second probability", found.gap, "viridis", share),
        ("KL from the evaluation before (nats)", found.kl, "magma", SymLogNorm(1e-3, vmin=0, vmax=_top(found.kl))),
    ]
    figure = plots.figure(min(24.0, 5.0 + 0.16 * max(30, count)), 17.0, dpi=110)
    axes = figure.subplots(5, 1, sharex=True, height_ratios=[1.5, 1, 1, 1, 1])
    for place, (name, values, colours, norm) in zip(axes, panels, strict=True):
        _draw_map(figure, place, values[:, start:], (name, colours, norm))
    _label_positions(axes, trace, tokenizer, start)
    figure.suptitle(_readable(title, 120), fontsize=12, family=_FONT, parse_math=False)
    plots.save(figure, path)


def _draw_map(figure: Figure, axes: Axes, values: NDArray[Any], look: tuple[str, str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    name, colours, norm = look
    height, width = values.shape
    extent = (-0.5, width - 0.5, height + 0.5, 0.5)
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", extent=extent)
    axes.set_facecolor("#d9d9d9")
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_ylabel("evaluation of\nthe position")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, pad=0.01)


def _label_positions(axes: Sequence[Axes], trace: Trace, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
    shown = trace.tokens[start:]
    if len(shown) <= LABELLED:
        texts = token_texts(tokenizer, shown)
        labels = [_readable(texts[token].replace(" ", "␣"), _LETTERS) for token in shown]
        for place in (axes[0], axes[-1]):
            place.set_xticks(range(len(shown)), labels, rotation=90, fontsize=8, family=_FONT, parse_math=False)
        axes[0].tick_params(labelbottom=True)
        what = "final token"
    else:
        ticks = list(range(0, len(shown), len(shown) // 20))
        axes[-1].set_xticks(ticks, [str(start + place) for place in ticks])
        what = "position"
    left_out = f"; the first {start} tokens of the prompt are left out" if start else ""
    axes[-1].set_xlabel(f"{what} (grey: no value{left_out})")


def _first_shown(trace: Trace) -> int:
    return max(0, int(trace.position.min()) - _PROMPT)


def _bound(trace: Trace) -> str:
    return f" (an upper bound at {trace.is_bound.mean():.0%} of the places)" if trace.is_bound.any() else ""


def _top(values: NDArray[Any]) -> float:
    """Largest finite value, or 1 where there is none above 0, since a colour scale needs an extent."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _readable(text: str, longest: int) -> str:
    """One short line of characters that the font has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font: Any = get_font(findfont(FontProperties(family=_FONT)))
    text = text.replace("\n", "↵").replace("\t", "⇥")
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(letter if letter.isprintable() and font.get_char_index(ord(letter)) else "□" for letter in text)
