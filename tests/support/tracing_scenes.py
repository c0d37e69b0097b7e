"""Evaluations made by hand, as the kernel reports them to an observer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.tracing import Recorder, Trace

PROMPT = (20, 21, 22)


def evaluation(logits: Tensor, *, start: int = 3, t: float = 0.5, is_read_out: bool = False) -> Evaluation:
    """Evaluation of consecutive positions from their logits, (L, V)."""
    positions = torch.arange(start, start + len(logits))[None]
    times = torch.full(positions.shape, t)
    return Evaluation(positions, times, torch.zeros(*positions.shape, 2), logits[None], is_read_out)


def block(steps: int, length: int, vocab_size: int, *, start: int = 3, seed: int = 0) -> list[Evaluation]:
    """A canvas evaluated `steps` times, sharper at each, the last for the read-out."""
    generator = torch.Generator().manual_seed(seed)
    end = torch.randn(length, vocab_size, generator=generator)
    out = []
    for step in range(steps):
        noise = torch.randn(length, vocab_size, generator=generator)
        share = step / max(1, steps - 1)
        logits = (1 + 5 * share) * end + (1 - share) * noise
        out.append(evaluation(logits, start=start, t=share, is_read_out=step == steps - 1))
    return out


def record(evaluations: Sequence[Evaluation], answer: Sequence[int] | None = None, **options: int) -> Trace:
    """Trace of evaluations; the answer is the likeliest tokens where none is given."""
    recorder = Recorder(**options)
    for one in evaluations:
        recorder(one)
    if answer is None:
        answer = [token for one in evaluations if one.is_read_out for token in one.logits[0].argmax(-1).tolist()]
    return recorder.finish([*PROMPT, *answer])
