"""The denoising loss: cross-entropy of clean tokens given their noisy states, at supervised positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from l2d_framework.noise import keyed_generator
from l2d_framework.process import Process
from l2d_framework.types import Layout, Query


@dataclass(frozen=True)
class Draws:
    """Supervised positions of a batch with their times and noise; L is the largest number per row.

    Attributes:
        positions: slots, (B, L), int64; those not valid repeat the row's last.
        valid: (B, L), bool.
        t: times, (B, L), float32.
        noise: standard normal, (B, L, D), float32.
        kept: True where a class label is kept, (B, L), bool.
    """

    positions: Tensor
    valid: Tensor
    t: Tensor
    noise: Tensor
    kept: Tensor


@dataclass(frozen=True)
class NoiseRule:
    """How training noise is drawn.

    Attributes:
        keys: key parts of each example, such as (seed, epoch, index in data order); never a rank or a micro-batch.
        draws: noisy copies of each supervised token.
        class_dropout: probability of dropping a class label.
        dropout_per: whether labels are dropped per token, as the authors' code does, or per example.
    """

    keys: Sequence[tuple[int | str, ...]]
    draws: int = 1
    class_dropout: float = 0.0
    dropout_per: Literal["token", "example"] = "token"


@dataclass(frozen=True)
class Losses:
    """Cross-entropies of one batch.

    Attributes:
        total: sum over supervised tokens of the mean over draws, in nats, (), float32; differentiable.
        tokens: cross-entropy of every draw, (N,), float32, detached.
        t: time of every draw, (N,), float32.
        count: supervised tokens.
    """

    total: Tensor
    tokens: Tensor
    t: Tensor
    count: int


def draw(process: Process, layout: Layout, rule: NoiseRule) -> Draws:
    """Times and noise for every supervised position; tokens of one block share their time.

    Each example draws from its own stream, on the host, so that neither batching nor the device changes its noise.

    Args:
        process: the model, for its schedule and state size.
        layout: tokens and blocks, (B, S); blocks >= 1 are supervised.
        rule: how to draw.

    Returns:
        The draws, on the layout's device.
    """
    device, size = layout.tokens.device, process.parametrization.state_size
    rows = [
        _draw_row(blocks, size, key, rule) for blocks, key in zip(layout.blocks.cpu().numpy(), rule.keys, strict=True)
    ]
    width = max(len(row[0]) for row in rows)

    def stack(which: int) -> Tensor:
        parts = [row[which] for row in rows]
        out = np.zeros((len(parts), width, *parts[0].shape[1:]), dtype=parts[0].dtype)
        for i, part in enumerate(parts):
            out[i, : len(part)] = part
            out[i, len(part) :] = part[-1:]  # no backbone is asked about a slot it could not answer for
        return torch.from_numpy(out).to(device)

    positions, u, noise, kept = (stack(i) for i in range(4))
    counts = torch.tensor([len(row[0]) for row in rows], device=device)
    valid = torch.arange(width, device=device) < counts[:, None]
    return Draws(positions, valid, process.schedule.sample_times(u), noise, kept)


def _draw_row(blocks: Any, size: int, key: tuple[int | str, ...], rule: NoiseRule) -> tuple[Any, Any, Any, Any]:
    random = keyed_generator(*key, "train")
    where = np.flatnonzero(blocks >= 1)
    numbers, block = np.unique(blocks[where], return_inverse=True)
    u = random.random((rule.draws, len(numbers)), dtype=np.float32)[:, block].reshape(-1)
    noise = random.standard_normal((rule.draws * len(where), size), dtype=np.float32)
    drops = random.random(len(u) if rule.dropout_per == "token" else 1)
    kept = np.broadcast_to(drops >= rule.class_dropout, u.shape)
    return np.tile(where, rule.draws), u, noise, kept


def denoising_loss(
    process: Process, layout: Layout, draws: Draws, *, classes: Tensor | None = None, chunk: int = 1024
) -> Losses:
    """Cross-entropy of the clean tokens given their noisy states, without weighting in t.

    Args:
        process: the model.
        layout: tokens and blocks, (B, S).
        draws: positions, times and noise.
        classes: class of each row, (B,), int64, -1 for none; None for none at all.
        chunk: positions per pass of the vocabulary head, which bounds memory to chunk x V.

    Returns:
        The losses.

    Source: arXiv:2501.15781, Eq. 4; arXiv:2502.13917, Eq. 3.
    """
    targets = layout.tokens.gather(1, draws.positions)
    condition = None
    if classes is not None:
        condition = torch.where(draws.kept, classes[:, None], -1)
    query = Query(
        x=process.diffuse(targets, draws.t, draws.noise),
        t=draws.t,
        positions=draws.positions,
        context=process.backbone.read(layout),
        condition=condition,
    )
    features = process.features(query)[draws.valid]
    count = int((layout.blocks >= 1).sum())
    copies = len(features) // max(count, 1)
    head = process.backbone.head
    total, tokens = chunked_cross_entropy(
        head, features, targets[draws.valid], chunk=chunk, parameters=process.backbone.head_parameters()
    )
    return Losses(total / max(copies, 1), tokens, draws.t[draws.valid], count)


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor],
    features: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Cross-entropy without ever holding the logits of more than `chunk` positions.

    The gradient of each chunk is taken at once, so that no logits are kept or computed twice.

    Args:
        head: maps (1, n, H) to logits (1, n, V).
        features: (N, H).
        targets: token ids, (N,), int64.
        chunk: positions per pass.
        parameters: trainable parameters inside `head`.

    Returns:
        The sum, (), differentiable in `features` and `parameters`, and every loss, (N,).
    """
    if not torch.is_grad_enabled():
        parts = [_losses(head, f, y) for f, y in zip(features.split(chunk), targets.split(chunk), strict=True)]
        losses = torch.cat(parts) if parts else features.new_zeros(0, dtype=torch.float32)
        return losses.sum(), losses
    return _Chunked.apply(head, chunk, features, targets, *parameters)  # type: ignore[no-any-return, no-untyped-call]


def _losses(head: Callable[[Tensor], Tensor], features: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(head(features[None]).squeeze(0).float(), targets, reduction="none")


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        chunk: int,
        features: Tensor,
        targets: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.zeros_like(features)
        own = [torch.zeros_like(p) for p in parameters]
        losses = features.new_zeros(len(features), dtype=torch.float32)
        for start in range(0, len(features), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                leaf = features[part].detach().requires_grad_()
                loss = _losses(head, leaf, targets[part])
                found = torch.autograd.grad(loss.sum(), [leaf, *parameters], allow_unused=True)
            losses[part] = loss.detach()
            gradient[part] = found[0]
            for total, piece in zip(own, found[1:], strict=True):
                if piece is not None:
                    total += piece
        ctx.save_for_backward(gradient, *own)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Any, ...]:
        gradient, *own = ctx.saved_tensors
        return (None, None, gradient * outputs[0], None, *(piece * outputs[0] for piece in own))
