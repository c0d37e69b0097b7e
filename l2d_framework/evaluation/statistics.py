"""Numbers with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
"""One number per sample; NaN where it is undefined."""


@dataclass(frozen=True)
class Estimate:
    """A number found from samples."""

    value: float | None  # None where no sample defines it
    standard_error: float | None  # over samples, taken as independent
    samples: int
    left_out: int = 0  # samples that do not define it
    truncated: int | None = None  # texts cut to the length limit of a model; None where there is no limit

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        # Equal numbers differ from their mean by rounding.
        if not self.standard_error or self.standard_error < 1e-12 * abs(self.value):
            return f"{self.value:.4g}" + ("" if self.standard_error is None else " ± 0")
        # Two digits of the error, and as many decimals of the value.
        decimals = max(0, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.value:,.{decimals}f} ± {self.standard_error:,.{decimals}f}"

    @property
    def is_clear(self) -> bool:
        """Whether the number is further from zero than two standard errors."""
        return self.value is not None and self.standard_error is not None and abs(self.value) > 2 * self.standard_error

    def to_json(self) -> dict[str, Any]:
        """Fields that say something."""
        return {name: value for name, value in asdict(self).items() if name != "truncated" or value is not None}


def mean(values: Sequence[float] | Values, *, truncated: int | None = None) -> Estimate:
    """Mean over the samples that define the number, NaN where undefined; its error is std / sqrt(n)."""
    given = np.asarray(values, dtype=np.float64)
    known = given[~np.isnan(given)]
    n = len(known)
    error = float(known.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return Estimate(float(known.mean()) if n else None, error, n, len(given) - n, truncated)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent numbers, std / sqrt(n); None for a single one."""
    # Python's sum, since numpy's differs from it in the last digit and stored results were made with this one.
    n, center = len(values), sum(values) / max(1, len(values))
    return math.sqrt(sum((value - center) ** 2 for value in values) / (n - 1) / n) if n > 1 else None


def ratio(numerators: Any, denominators: Any) -> Estimate:
    """sum a / sum b of float64 arrays or tensors, such as a mean over tokens, and its error, linearised, over rows."""
    n, total = len(numerators), float(denominators.sum())
    value = float(numerators.sum()) / total
    spread = float(((numerators - value * denominators) ** 2).sum())
    return Estimate(value, math.sqrt(spread * n / (n - 1)) / total if n > 1 else None, n)


def exp_of_ratio(numerators: Values, denominators: Values, *, truncated: int | None = None) -> Estimate:
    """exp(sum a / sum b); samples with b <= 0 are left out, and the error is the ratio's times the number."""
    known = denominators > 0
    if not known.any():
        return Estimate(None, None, 0, len(known), truncated)
    rate = ratio(numerators[known], denominators[known])
    assert rate.value is not None  # a ratio of something
    value = float(np.exp(rate.value))
    error = None if rate.standard_error is None else value * rate.standard_error
    return Estimate(value, error, rate.samples, len(known) - rate.samples, truncated)
