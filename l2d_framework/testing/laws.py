"""What a law is, whom it binds, and how a broken one is reported: independent of pytest and of `python -O`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Check = Callable[[Any], None]
"""A law: takes a component and raises AssertionError if it is broken."""


class Laws:
    """Laws of one kind of component: `around` makes a check of a function, `build` what declares capabilities."""

    def __init__(
        self,
        around: Callable[[Any], Check] = lambda law: law,
        build: Callable[[Any], Any] = lambda component: component,
    ) -> None:
        self._around, self._build = around, build
        self._laws: list[tuple[Check, Callable[[Any], Any]]] = []

    def __call__(self, law: Callable[[Any], None]) -> Check:
        """Register a law of every component of the kind."""
        return self.where(lambda _: True)(law)

    def where(self, binds: Callable[[Any], Any]) -> Callable[[Any], Check]:
        """Register a law of the components that declare something."""

        def register(law: Callable[[Any], None]) -> Check:
            check = self._around(law)
            self._laws.append((check, binds))
            return check

        return register

    def of(self, component: Any) -> list[Check]:
        """The checks that bind a component, in the order of their registration."""
        built = self._build(component)
        return [check for check, binds in self._laws if binds(built)]


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
    off = distance(actual, expected)
    ensure(
        off <= tolerance,
        f"{claim}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}, largest relative difference {off:.3g}, "
        f"allowed {tolerance:.3g}.",
    )
