"""Cross-entropy by time: of the network, and of an earlier prediction of its own with the exact likelihood of x_t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2d_framework.diffusion.logits import Logits
from l2d_framework.evaluation.diagnosis.batches import Batch
from l2d_framework.evaluation.diagnosis.bayes import TokenLikelihood
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.types import Query

ANCHORS = 2
"""How many of the first times lend their prediction as a prior."""


@dataclass(frozen=True)
class Entropies:
    """Cross-entropies of rows, summed over their tokens, in nats."""

    network: Tensor  # at each time, (B, T), float64
    combined: Tensor  # with the prediction at each first time as prior, (B, ANCHORS, T), float64; NaN before that time


@dataclass(frozen=True)
class _Seen:
    """The network's view of all positions at one time."""

    t: float
    x: Tensor
    logits: Logits


@torch.no_grad()
def cross_entropies(
    model: DiffusionLM, batch: Batch, *, context: Any, times: Sequence[float], likelihood: TokenLikelihood
) -> Entropies:
    """Cross-entropies of the true tokens given their noisy states.

    Every position keeps one noise for all times. At the first time the state is noise alone, as when sampling starts.
    The prior that a prediction p_s(y | x_s) implies is p_s(y | x_s) / N(x_s | y), so the combination at t is
    softmax(log p_s(y | x_s) - log N(x_s | y) + log N(x_t | y)); for the first time this is log p_0(y) + log N(x_t | y).
    """
    seen = _look(model, batch, context, times)
    rows, count = len(batch.positions), len(times)
    network = torch.zeros(rows, count, dtype=torch.float64)
    combined = torch.full((rows, ANCHORS, count), torch.nan, dtype=torch.float64)
    for anchor in range(ANCHORS):
        combined[:, anchor, anchor:] = 0
    targets = batch.targets
    for parts in zip(*(one.logits.parts() for one in seen), strict=True):
        where = parts[0][0]
        logarithms = [part.log_softmax(-1) for _, part in parts]
        # The first state carries nothing of its token, whatever the schedule says of that time.
        hints = [0, *(likelihood(one.x[:, where], one.t) for one in seen[1:])]
        priors = [logarithms[anchor] - hints[anchor] for anchor in range(ANCHORS)]
        for number, (logarithm, hint) in enumerate(zip(logarithms, hints, strict=True)):
            network[:, number] += _summed(logarithm, targets[:, where], batch.valid[:, where])
            for anchor in range(min(number + 1, ANCHORS)):
                bayes = (priors[anchor] + hint).log_softmax(-1)
                combined[:, anchor, number] += _summed(bayes, targets[:, where], batch.valid[:, where])
    return Entropies(network, combined)


def _look(model: DiffusionLM, batch: Batch, context: Any, times: Sequence[float]) -> list[_Seen]:
    """Answers at every time; a self-conditioned network is shown its prediction at the time before, as in sampling."""
    space, table, targets = model.parametrization, model.backbone.table(), batch.targets
    noise = batch.noise(model)
    previous: Tensor | None = None
    seen = []
    for number, time in enumerate(times):
        t = torch.full(targets.shape, time, device=targets.device)
        x = model.diffuse(targets, t, noise) if number else space.prior_scale * noise
        query = Query(x, t, batch.positions, context, batch.condition, previous=previous, shared_time=time)
        answer = model.answer(query)
        seen.append(_Seen(time, x, answer))
        if space.uses_previous:
            previous = torch.cat([space.remember(logits, table) for _, logits in answer.parts()], 1)
    return seen


def _summed(logarithms: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    losses = -logarithms.gather(-1, targets[..., None])[..., 0]
    return losses.masked_fill(~valid, 0).sum(1, dtype=torch.float64).cpu()
