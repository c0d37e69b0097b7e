"""What a predicted gain says about further evaluations."""

from __future__ import annotations

from typing import Literal

from l2d_framework.evaluation.statistics import Estimate

Verdict = Literal["gains", "does not gain", "not clear"]

NEGLIGIBLE = 1e-3
"""Nats per token below which an advantage counts as none; rounding is far smaller."""


def verdict(gain: Estimate) -> Verdict:
    """What a predicted gain says, at two standard errors."""
    if gain.value is None or gain.standard_error is None:
        return "not clear"
    if gain.value - 2 * gain.standard_error > NEGLIGIBLE:
        return "gains"
    return "does not gain" if gain.value + 2 * gain.standard_error < NEGLIGIBLE else "not clear"
