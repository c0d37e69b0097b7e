"""How a broken law is reported; independent of pytest and of `python -O`."""

from __future__ import annotations

from torch import Tensor


def ensure(holds: bool | Tensor, message: str) -> None:
    """Fail unless a claim holds."""
    if not bool(holds):
        raise AssertionError(message)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the larger of 1 and the largest expected entry; infinite when shapes differ."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1))


def ensure_close(actual: Tensor, expected: Tensor, claim: str, *, tolerance: float = 1e-4) -> None:
    """Fail unless two tensors agree."""
    found = distance(actual, expected)
    ensure(
        found <= tolerance,
        f"{claim}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}, largest relative difference {found:.3g}, "
        f"allowed {tolerance:.3g}.",
    )
