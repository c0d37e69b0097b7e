"""Numbers with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
"""One number per sample; NaN where it is undefined."""


@dataclass(frozen=True)
class Estimate:
    """A number found from samples.

    Attributes:
        value: the number; None where no sample defines it.
        standard_error: over samples, taken as independent; None where there is none.
        samples: how many samples it rests on.
        left_out: how many samples do not define it.
        truncated: how many texts were cut to the length limit of a model; None where there is no limit.
    """

    value: float | None
    standard_error: float | None
    samples: int
    left_out: int = 0
    truncated: int | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        # Equal numbers differ from their mean by rounding.
        if not self.standard_error or self.standard_error < 1e-12 * abs(self.value):
            return f"{self.value:.4g}" + ("" if self.standard_error is None else " ± 0")
        # Two digits of the error, and as many decimals of the value.
        decimals = max(0, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.value:,.{decimals}f} ± {self.standard_error:,.{decimals}f}"

    def to_json(self) -> dict[str, Any]:
        """Fields that say something.

        Returns:
            A JSON-ready dictionary.
        """
        fields = {"value": self.value, "standard_error": self.standard_error, "samples": self.samples}
        more = {"left_out": self.left_out} | ({} if self.truncated is None else {"truncated": self.truncated})
        return fields | more


def mean(values: Sequence[float] | Values, *, truncated: int | None = None) -> Estimate:
    """Mean over the samples that define the number.

    Args:
        values: one per sample, NaN where undefined, (N,).
        truncated: how many texts were cut.

    Returns:
        The mean and std / sqrt(n).
    """
    given = np.asarray(values, dtype=np.float64)
    known = given[~np.isnan(given)]
    n = len(known)
    return Estimate(
        value=float(known.mean()) if n else None,
        standard_error=float(known.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        samples=n,
        left_out=len(given) - n,
        truncated=truncated,
    )


def exp_of_ratio(numerators: Values, denominators: Values, *, truncated: int | None = None) -> Estimate:
    """The exponential of a ratio of sums, exp(sum a / sum b); samples with b <= 0 are left out.

    Args:
        numerators: a of each sample, (N,).
        denominators: b of each sample, (N,).
        truncated: how many texts were cut.

    Returns:
        The number; its standard error is that of the ratio, linearised, times the number.
    """
    known = denominators > 0
    a, b = numerators[known], denominators[known]
    n = len(a)
    if not n:
        return Estimate(None, None, 0, len(known), truncated)
    ratio = a.sum() / b.sum()
    value = float(np.exp(ratio))
    spread = float(np.sqrt(((a - ratio * b) ** 2).sum() * n / (n - 1)) / b.sum()) if n > 1 else None
    return Estimate(value, None if spread is None else value * spread, n, len(known) - n, truncated)
