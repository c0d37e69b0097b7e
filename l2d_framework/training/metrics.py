"""Measurements of training: exact mean losses overall and by time, seconds, memory."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

BINS = 10
"""Equal bins of t; bin 0 holds the noisiest tokens."""


class LossMeter:
    """Sums of token losses and their number; nothing is copied to the host before `results`."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2, BINS + 2, dtype=dtype, device=device)

    def add(self, outputs: dict[str, Tensor], counted: Tensor | None = None) -> None:
        """Take in what a `Learner` returned for a batch, all of it or the rows that are `counted`, (B,), bool."""
        losses = outputs["losses"].detach().to(self._sums.dtype)
        weights = torch.ones_like(losses) if counted is None else counted[outputs["row"]].to(losses.dtype)
        pair = torch.stack([losses * weights, weights])
        self._sums[:, BINS] += pair.sum(1)
        if "is_pad" in outputs:
            self._sums[:, BINS + 1] += pair[:, ~outputs["is_pad"]].sum(1)
        if "t" in outputs:
            self._sums.index_add_(1, (outputs["t"] * BINS).long().clamp(0, BINS - 1), pair)

    def results(self, accelerator: Any) -> dict[str, float]:
        """Means since the last call, over all processes, in nats per token; every process must call.

        `loss` and, for each bin that saw a token, `loss_t00` to `loss_t09`; where padding was learnt, too, also
        `loss_without_pads`.
        """
        sums, counts = accelerator.reduce(self._sums.clone()).tolist()
        self._sums.zero_()
        names = [f"loss_t{i:02d}" for i in range(BINS)] + ["loss", "loss_without_pads"]
        means = {n: s / c for n, s, c in zip(names, sums, counts, strict=True) if c}
        if counts[BINS + 1] in (0, counts[BINS]):
            means.pop("loss_without_pads", None)
        return means


class Stopwatch:
    """Seconds spent between `start` and `pause`."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._seconds = 0.0

    def start(self) -> None:
        """Go on measuring; nothing happens when it is running."""
        if self._started is None:
            self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop measuring until the next `start`."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def lap(self) -> float:
        """Pause, and begin again from zero."""
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a CUDA device, else resident; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
