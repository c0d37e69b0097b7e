"""Learning rate as a function of the optimizer update."""

from __future__ import annotations

import math

from l2d_framework.config import TrainingSection


def learning_rate(training: TrainingSection, step: int, total_steps: int) -> float:
    """Learning rate of one update.

    Warm-up rises from the final rate and reaches the peak at its last update. The logarithmic one follows
    final + (peak - final) * ln(step + 1) / ln(warmup_steps). Decay ends at the final rate with the last update.

    Source: the authors' released code of arXiv:2501.15781 (DeepSpeed's `WarmupDecayLR` with `warmup_type: log`).
    """
    low, high, warmup = training.final_learning_rate, training.learning_rate, training.warmup_steps
    if training.warmup_ratio is not None:
        warmup = math.ceil(training.warmup_ratio * total_steps)
    if step < warmup and training.warmup == "log":
        share = math.log(step + 1) / math.log(max(warmup, 2))
    elif step < warmup:
        share = (step + 1) / warmup
    else:
        progress = min((step - warmup) / max(total_steps - 1 - warmup, 1), 1.0)
        share = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[
            training.decay
        ]
    return low + (high - low) * share
