"""One model on two devices or in two precisions: how far its predictions are apart, and how many tokens differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2d_framework.config import SamplingSection
from l2d_framework.diffusion.sampler import Sampler
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.diagnosis.batches import Batch, batches
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.types import Query

Rows = Sequence[Mapping[str, Any]]
"""Rows of `PreparedData`."""


@dataclass(frozen=True)
class Reading:
    """How rows are read: the true tokens before each supervised one given, its noise named by row and position.

    Attributes:
        rows: the rows.
        sampling: how to diffuse.
        times: at which predictions are compared.
    """

    rows: Rows
    sampling: SamplingSection
    times: Sequence[float]


@torch.no_grad()
def tokens(model: DiffusionLM, reading: Reading, batch_size: int) -> Tensor:
    """Likeliest tokens of a solve of every supervised position.

    Args:
        model: the model.
        reading: what to read.
        batch_size: rows at a time.

    Returns:
        (N,), int64, on the host; in an order that the batch size does not change.
    """
    solve, found = Sampler.of(model, reading.sampling), []
    for batch in batches(model, reading.rows, seed=reading.sampling.seed, size=batch_size):
        context = model.backbone.read(batch.layout)
        parts = [
            logits.argmax(-1)
            for portion in batch.portions(model)
            for _, logits in solve(portion.block(context)).logits.parts()
        ]
        found.append(torch.cat(parts, 1)[batch.valid].cpu())
    return torch.cat(found)


@torch.no_grad()
def difference(first: DiffusionLM, second: DiffusionLM, reading: Reading, batch_size: int) -> float:
    """Largest difference of the log-probabilities of the true tokens, over positions and times.

    Args:
        first: a model.
        second: the same elsewhere.
        reading: what to read.
        batch_size: rows at a time.

    Returns:
        In nats.

    Raises:
        ConfigError: if the state is drawn on the device, so that each has other noise.
    """
    pairs = [batches(one, reading.rows, seed=reading.sampling.seed, size=batch_size) for one in (first, second)]
    largest = 0.0
    for here, there in zip(*pairs, strict=True):
        if hasattr(here.noise(first), "dense"):
            raise ConfigError(
                "The noise of this state space is drawn on the device, so devices cannot agree. Compare a model whose "
                "noise is drawn on the host, such as one with parametrization 'embedding'."
            )
        found = zip(_predictions(first, here, reading), _predictions(second, there, reading), strict=True)
        largest = max(largest, *(float((a - b).abs().max()) for a, b in found))
    return largest


def _predictions(model: DiffusionLM, batch: Batch, reading: Reading) -> Iterator[Tensor]:
    """Log-probabilities of the true tokens of a portion at one time, (N,), on the host."""
    context = model.backbone.read(batch.layout)
    for portion in batch.portions(model):
        noise, targets = portion.noise(model), portion.targets
        for time in reading.times:
            t = torch.full(targets.shape, time, device=targets.device)
            x = model.diffuse(targets, t, noise)
            query = Query(x, t, portion.positions, context, portion.condition, shared_time=time)
            logarithms = model(query).logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            yield logarithms[portion.valid].cpu()
