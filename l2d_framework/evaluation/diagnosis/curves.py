"""Cross-entropy by time: of the network, and of an earlier prediction of its own with the exact likelihood of x_t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.logits import Logits, dense, pieces
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.diagnosis.batches import Batch
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.types import Query

ANCHORS = 2
"""How many of the first times lend their prediction as a prior."""


class TokenLikelihood:
    """log N(x_t; alpha(t) clean(y), (sigma(t) prior_scale)^2 I) for every token y, up to a number all tokens share.

    The law holds for every schedule and for every parametrization with the corruption that
    `Parametrization.corrupt` has by default, x_t = alpha(t) clean + sigma(t) prior_scale noise. The model's weights
    must not change while this is used.
    """

    @torch.no_grad()
    def __init__(self, diffusion: Diffusion) -> None:
        space, table = diffusion.parametrization, diffusion.backbone.table()
        if not space.config.gaussian_path:
            raise ConfigError(
                f"Parametrization {space.config.component_name()!r} corrupts tokens in a way of its own, for which the "
                "likelihood of a noisy state is not known here. Diagnose models with Gaussian noise."
            )
        tokens = torch.arange(diffusion.backbone.vocab_size, device=table.device)[None]
        # States as wide as the vocabulary stay symbolic until a piece is used.
        parts = pieces(1, tokens.shape[1], space.state_size)
        self._clean = [space.encode(tokens[:, part], table) for part in parts]
        self._first = dense(self._clean[0][:, :1])
        self._schedule, self._scale = diffusion.schedule, space.prior_scale

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Logarithms of the likelihood of states (B, L, D), less that of token 0, (B, L, V), float32; sigma(t) > 0.

        With move(y) = clean(y) - clean(0) the difference of the two squared distances is linear in x:
        (alpha x . move(y) - alpha^2 (|clean(y)|^2 - |clean(0)|^2) / 2) / (sigma prior_scale)^2. Components that all
        tokens share, whose sum would swamp the rest in float32, drop out.
        """
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = float(self._schedule.alpha(time)), float(self._schedule.sigma(time)) * self._scale
        state, logarithms = dense(x), []
        for part in self._clean:
            clean = dense(part)
            move = (clean - self._first)[0]
            rise = (move * (clean + self._first)[0]).sum(-1) / 2
            logarithms.append((alpha * (state @ move.T) - alpha**2 * rise) / sigma**2)
        return torch.cat(logarithms, -1)


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
    """Answers at every time; what a network is shown of its evaluation before is that at the time before."""
    space, table, targets = model.parametrization, model.backbone.table(), batch.targets
    noise = batch.noise(model)
    previous: Tensor | None = None
    carried: Tensor | None = None
    seen = []
    for number, time in enumerate(times):
        t = torch.full(targets.shape, time, device=targets.device)
        x = model.diffuse(targets, t, noise) if number else space.prior_scale * noise
        query = Query(
            x, t, batch.positions, context, batch.condition, previous=previous, carried=carried, shared_time=time
        )
        features = model.features(query)
        answer = model.answer_from(features, query)
        seen.append(_Seen(time, x, answer))
        if model.backbone.carries:
            carried = features
        if space.uses_previous:
            previous = torch.cat([space.remember(logits, table) for _, logits in answer.parts()], 1)
    return seen


def _summed(logarithms: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    losses = -logarithms.gather(-1, targets[..., None])[..., 0]
    return losses.masked_fill(~valid, 0).sum(1, dtype=torch.float64).cpu()
