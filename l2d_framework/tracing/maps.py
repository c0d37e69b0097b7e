"""A trace as pictures: evaluations downwards, positions across."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2d_framework.tracing.record import Trace


@dataclass(frozen=True)
class Maps:
    """Arrays (S, C): row s is the s-th evaluation of a position, column c the position; NaN where there was none.

    Positions are evaluated at different moments and, under an adaptive solver, not equally often.

    Attributes:
        confidence: probability of the likeliest token; 1 where the token was given.
        final: probability of the token that stands there in the end, or where `Trace.is_bound` an upper bound.
        entropy: in nats.
        gap: probability of the likeliest token minus that of the second.
        kl: divergence from the evaluation before, summed over the vocabulary, in nats.
        kl_mean: the same divided by the size of the vocabulary, as TESS 2's script reports it.

    Source: TESS 2, https://github.com/hamishivi/tess-2, scripts/confidence_over_steps.py.
    """

    confidence: NDArray[Any]
    final: NDArray[Any]
    entropy: NDArray[Any]
    gap: NDArray[Any]
    kl: NDArray[Any]
    kl_mean: NDArray[Any]


def maps(trace: Trace) -> Maps:
    """Arrange a trace by evaluation and position.

    Args:
        trace: of S evaluations at most per position, C positions.

    Returns:
        Six arrays (S, C), float32.
    """
    row = rounds(trace)
    shape = int(row.max()) + 1, len(trace.tokens)

    def spread(values: NDArray[Any]) -> NDArray[Any]:
        out = np.full(shape, np.nan, dtype=np.float32)
        out[row, trace.position] = values
        return out

    confidence = spread(trace.probabilities[:, 0])
    confidence[:, ~trace.is_predicted] = 1
    kl = spread(trace.kl)
    return Maps(
        confidence=confidence,
        final=spread(trace.final),
        entropy=spread(trace.entropy),
        gap=spread(trace.probabilities[:, 0] - trace.probabilities[:, 1]),
        kl=kl,
        kl_mean=kl / trace.vocab_size,
    )


def rounds(trace: Trace) -> NDArray[Any]:
    """How often a position had been evaluated before.

    Args:
        trace: R rows.

    Returns:
        0 at the first evaluation of a position, 1 at its second, (R,), int64.
    """
    order = np.argsort(trace.position, kind="stable")
    sorted_positions = trace.position[order]
    first = np.searchsorted(sorted_positions, sorted_positions)
    out = np.empty_like(order)
    out[order] = np.arange(len(order)) - first
    return out
