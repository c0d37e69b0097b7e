"""What answers cost: evaluations, time, and both beside the plain language model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


class Meter:
    """Counts evaluations of answer tokens and the time they took."""

    def __init__(self) -> None:
        self._evaluations: Counter[int] = Counter()
        self._tokens = 0
        self._seconds = 0.0
        self._plain: tuple[float, float] | None = None

    def add(self, evaluations: Iterable[int]) -> None:
        """Count an answer."""
        self._evaluations.update(evaluations)

    def time(self, tokens: int, seconds: float) -> None:
        """Count the time of a batch."""
        self._tokens += tokens
        self._seconds += seconds

    def compare(self, seconds: float, plain: float) -> None:
        """Note the time of one batch beside the plain language model's, for as many tokens."""
        self._plain = (seconds, plain)

    @property
    def is_compared(self) -> bool:
        """True once the plain language model was timed."""
        return self._plain is not None

    def state(self) -> tuple[Any, ...]:
        """Everything counted."""
        return self._evaluations, self._tokens, self._seconds, self._plain

    def report(self, states: Sequence[tuple[Any, ...]], *, reads_main: bool) -> dict[str, Any]:
        """Numbers for results.json, from the states of all processes; None where nothing was generated."""
        counts: Counter[int] = Counter()
        for state in states:
            counts.update(state[0])
        total = sum(counts.values())
        tokens = sum(state[1] for state in states)
        seconds = max((state[2] for state in states), default=0.0)
        mean = sum(value * count for value, count in counts.items()) / total if total else None
        plain = next((state[3] for state in states if state[3] is not None), None)
        return {
            "tokens": total,
            "evaluations_per_token_mean": mean,
            "evaluations_per_token_p95": _quantile(counts, 0.95),
            "tokens_per_second": tokens / seconds if seconds else None,
            "cost_ratio_by_evaluations": None if mean is None else mean + reads_main,
            "cost_ratio_measured": None if plain is None else plain[0] / plain[1],
            "cost_ratio_definition": "by evaluations: network passes per answer token, where the plain language model "
            "needs one; further calls of a guidance and the reading of prompts are left out. Measured: seconds per "
            "answer token of the first batch, over those of transformers' generate on the same prompts.",
        }


def _quantile(counts: Counter[int], share: float) -> int | None:
    """Smallest value that at least this share of the counts does not exceed."""
    total, seen = sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= share * total:
            return value
    return None
