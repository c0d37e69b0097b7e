"""What answers cost: evaluations, time, and both beside the plain language model's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Meter:
    """Counts evaluations of answer tokens and the time they took."""

    evaluations: Counter[int] = field(default_factory=Counter)  # how many tokens had so many
    tokens: int = 0
    seconds: float = 0.0
    beside_plain: tuple[float, float] | None = None  # seconds per token of one batch, here and of the language model

    def add(self, evaluations: Iterable[int]) -> None:
        """Count an answer."""
        self.evaluations.update(evaluations)

    def time(self, tokens: int, seconds: float) -> None:
        """Count the time of a batch."""
        self.tokens += tokens
        self.seconds += seconds


def report(meters: Sequence[Meter], *, reads_main: bool) -> dict[str, Any]:
    """Numbers for results.json, from the meters of all processes; None where nothing was generated."""
    counts = sum((meter.evaluations for meter in meters), Counter[int]())
    total = counts.total()
    tokens = sum(meter.tokens for meter in meters)
    seconds = max((meter.seconds for meter in meters), default=0.0)
    mean = sum(value * count for value, count in counts.items()) / total if total else None
    plain = next((meter.beside_plain for meter in meters if meter.beside_plain is not None), None)
    return {
        "tokens": total,
        "evaluations_per_token_mean": mean,
        "evaluations_per_token_p95": sorted(counts.elements())[math.ceil(0.95 * total) - 1] if total else None,
        "tokens_per_second": tokens / seconds if seconds else None,
        "cost_ratio_by_evaluations": None if mean is None else mean + reads_main,
        "cost_ratio_measured": None if plain is None else plain[0] / plain[1],
        "cost_ratio_definition": "by evaluations: network passes per answer token, where the plain language model "
        "needs one; further calls of a guidance and the reading of prompts are left out. Measured: seconds per "
        "answer token of the first batch, over those of transformers' generate on the same prompts.",
    }
