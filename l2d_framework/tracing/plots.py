"""A trace as heat maps, evaluations downwards and positions across; drawing needs matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from l2d_framework.evaluation import plots
from l2d_framework.tracing.page import token_texts
from l2d_framework.tracing.record import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELLED = 60
"""Most positions whose tokens are written below the map."""
_PROMPT = 12
_LETTERS = 12
_FONT = "DejaVu Sans"


@dataclass(frozen=True)
class Maps:
    """Arrays (S, C): row s is the s-th evaluation of a position, column c the position; NaN where there was none.

    Positions are evaluated at different moments and, under an adaptive solver, not equally often.

    Source: TESS 2, https://github.com/hamishivi/tess-2, scripts/confidence_over_steps.py.
    """

    confidence: NDArray[Any]  # probability of the likeliest token; 1 where the token was given
    final: NDArray[Any]  # probability of the token that stands there in the end, or where `Trace.is_bound` a bound
    entropy: NDArray[Any]  # in nats
    gap: NDArray[Any]  # probability of the likeliest token minus that of the second
    kl: NDArray[Any]  # divergence from the evaluation before, summed over the vocabulary, in nats
    kl_mean: NDArray[Any]  # the same divided by the size of the vocabulary, as TESS 2's script reports it


def maps(trace: Trace) -> Maps:
    """Arrange a trace by evaluation and position."""
    row = _rounds(trace)
    shape = int(row.max()) + 1, len(trace.tokens)

    def spread(values: NDArray[Any]) -> NDArray[Any]:
        out = np.full(shape, np.nan, dtype=np.float32)
        out[row, trace.position] = values
        return out

    confidence, kl = spread(trace.probabilities[:, 0]), spread(trace.kl)
    confidence[:, ~trace.is_predicted] = 1
    gap = spread(trace.probabilities[:, 0] - trace.probabilities[:, 1])
    return Maps(confidence, spread(trace.final), spread(trace.entropy), gap, kl, kl / trace.vocab_size)


def _rounds(trace: Trace) -> NDArray[Any]:
    """How often the position of each row had been evaluated before, (R,), int64."""
    order = np.argsort(trace.position, kind="stable")
    sorted_positions = trace.position[order]
    first = np.searchsorted(sorted_positions, sorted_positions)
    out = np.empty_like(order)
    out[order] = np.arange(len(order)) - first
    return out


def draw_trace(trace: Trace, tokenizer: PreTrainedTokenizerBase, path: Path, *, title: str = "") -> None:
    """Confidence, probability of the final token, entropy, gap and divergence over evaluations and positions.

    Of a long prompt only the last 12 tokens are shown.
    """
    from matplotlib.colors import Normalize, SymLogNorm

    shown, start = maps(trace), max(0, int(trace.position.min()) - _PROMPT)
    share, count = Normalize(0, 1), len(trace.tokens) - start
    bound = f" (an upper bound at {trace.is_bound.mean():.0%} of the places)" if trace.is_bound.any() else ""
    panels: list[tuple[str, NDArray[Any], str, Normalize]] = [
        ("confidence: probability of the likeliest token", shown.confidence, "viridis", share),
        (f"probability of the final token{bound}", shown.final, "viridis", share),
        ("entropy (nats)", shown.entropy, "magma", Normalize(0, _top(shown.entropy))),
        ("gap: first minus second probability", shown.gap, "viridis", share),
        ("KL from the evaluation before (nats)", shown.kl, "magma", SymLogNorm(1e-3, vmin=0, vmax=_top(shown.kl))),
    ]
    figure = plots.figure(min(24.0, 5.0 + 0.16 * max(30, count)), 17.0, dpi=110)
    axes = figure.subplots(5, 1, sharex=True, height_ratios=[1.5, 1, 1, 1, 1])
    for place, (name, values, colours, norm) in zip(axes, panels, strict=True):
        _draw_map(place, values[:, start:], cmap=colours, norm=norm)
        place.set_title(name, fontsize=10, loc="left")
    _label_positions(axes, trace, tokenizer, start)
    figure.suptitle(_readable(title, 120), fontsize=12, family=_FONT, parse_math=False)
    plots.save(figure, path)


def _draw_map(axes: Axes, values: NDArray[Any], **colours: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    height, width = values.shape
    extent = (-0.5, width - 0.5, height + 0.5, 0.5)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", extent=extent, **colours)
    axes.set_facecolor("#d9d9d9")
    axes.set_ylabel("evaluation of\nthe position")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes, pad=0.01)


def _label_positions(axes: Sequence[Axes], trace: Trace, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
    shown = trace.tokens[start:]
    if len(shown) <= _LABELLED:
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
