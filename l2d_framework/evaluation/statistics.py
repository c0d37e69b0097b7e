"""Numbers with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

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
        fields = {"value": self.value, "standard_error": self.standard_error, "samples": self.samples}
        more = {"left_out": self.left_out} | ({} if self.truncated is None else {"truncated": self.truncated})
        return fields | more


def mean(values: Sequence[float] | Values, *, truncated: int | None = None) -> Estimate:
    """Mean over the samples that define the number, NaN where undefined; its error is std / sqrt(n)."""
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


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent numbers, std / sqrt(n); None for a single one."""
    # Python's sum, since numpy's differs from it in the last digit and stored results were made with this one.
    n, center = len(values), sum(values) / max(1, len(values))
    return math.sqrt(sum((value - center) ** 2 for value in values) / (n - 1) / n) if n > 1 else None


class _Sums(Protocol):
    """What numpy's arrays and torch's tensors have in common."""

    def sum(self) -> Any: ...
    def __sub__(self, other: Any, /) -> Self: ...
    def __rmul__(self, other: float, /) -> Self: ...
    def __pow__(self, other: int, /) -> Self: ...
    def __len__(self) -> int: ...


def ratio(numerators: _Sums, denominators: _Sums) -> Estimate:
    """sum a / sum b of float64 numbers, such as a mean over tokens with its error, linearised, over rows."""
    n, total = len(numerators), float(denominators.sum())
    value = float(numerators.sum()) / total
    spread = float(((numerators - value * denominators) ** 2).sum())
    return Estimate(value, math.sqrt(spread * n / (n - 1)) / total if n > 1 else None, n)


def exp_of_ratio(numerators: Values, denominators: Values, *, truncated: int | None = None) -> Estimate:
    """The exponential of a ratio of sums, exp(sum a / sum b); samples with b <= 0 are left out."""
    known = denominators > 0
    if not known.any():
        return Estimate(None, None, 0, len(known), truncated)
    found = ratio(numerators[known], denominators[known])
    assert found.value is not None  # a ratio of something
    value, spread = float(np.exp(found.value)), found.standard_error
    error = None if spread is None else value * spread
    return Estimate(value, error, found.samples, len(known) - found.samples, truncated)
