"""From sums over rows to numbers with standard errors, and to what they say about further evaluations."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from l2d_framework.evaluation.statistics import Estimate

Verdict = Literal["gains", "does not gain", "not clear"]

NEGLIGIBLE = 1e-3
"""Nats per token below which an advantage counts as none; rounding is far smaller."""


def per_token(sums: Tensor, tokens: Tensor) -> Estimate:
    """A mean over tokens, its standard error over rows, within which tokens need not be independent.

    Args:
        sums: of each row over its tokens, (N,), float64.
        tokens: of each row, (N,), float64.

    Returns:
        sum a / sum b; the standard error is that of a ratio, linearised, and None for a single row.
    """
    rows, total = len(sums), tokens.sum()
    value = float(sums.sum() / total)
    if rows < 2:
        return Estimate(value, None, rows)
    spread = ((sums - value * tokens) ** 2).sum() * rows / (rows - 1)
    return Estimate(value, float(spread.sqrt() / total), rows)


def verdict(gain: Estimate) -> Verdict:
    """What a predicted gain says, at two standard errors.

    Args:
        gain: in nats per token.

    Returns:
        `gains` if all of gain ± 2 standard errors is above `NEGLIGIBLE`, `does not gain` if all of it is below.
    """
    if gain.value is None or gain.standard_error is None:
        return "not clear"
    if gain.value - 2 * gain.standard_error > NEGLIGIBLE:
        return "gains"
    return "does not gain" if gain.value + 2 * gain.standard_error < NEGLIGIBLE else "not clear"
