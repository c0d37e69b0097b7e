"""The denoising loss: cross-entropy of clean tokens given their noisy states, at supervised positions only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from l2d_framework.blame import naming_plugins
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.logits import Logits
from l2d_framework.diffusion.rng import keyed_generator
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
        first_t: times of the prediction that training conditions itself on, with the same noise, (B, L), float32.
        conditioned: rows that are shown such a prediction, (B,), bool.
    """

    positions: Tensor
    valid: Tensor
    t: Tensor
    noise: Tensor
    kept: Tensor
    first_t: Tensor
    conditioned: Tensor


@dataclass(frozen=True)
class NoiseRule:
    """How training noise is drawn.

    Attributes:
        keys: key parts of each example, such as (seed, epoch, index in data order); never a rank or a micro-batch.
        draws: noisy copies of each supervised token.
        class_dropout: probability of dropping a class label.
        dropout_per: whether labels are dropped per token, as the authors' code does, or per example.
        self_conditioning: probability that an example is shown a first prediction, where the parametrization reads one.
        is_first_noisier: whether that prediction is made one step nearer to the noise, as in training, or at the same
            time, as the authors evaluate.
    """

    keys: Sequence[tuple[int | str, ...]]
    draws: int = 1
    class_dropout: float = 0.0
    dropout_per: Literal["token", "example"] = "token"
    self_conditioning: float = 0.0
    is_first_noisier: bool = True


@dataclass(frozen=True)
class Losses:
    """Cross-entropies of one batch.

    Attributes:
        total: sum over supervised tokens of the mean over draws, in nats, (), float32; differentiable.
        tokens: cross-entropy of every draw, (N,), float32, detached.
        t: time of every draw, (N,), float32.
        count: supervised tokens.
        row: row of every draw, (N,), int64.
        position: slot of every draw, (N,), int64.
    """

    total: Tensor
    tokens: Tensor
    t: Tensor
    count: int
    row: Tensor
    position: Tensor


@naming_plugins()
def draw(diffusion: Diffusion, layout: Layout, rule: NoiseRule) -> Draws:
    """Times and noise for every supervised position; tokens of one block share their time.

    Each example draws from its own stream, on the host, so that neither batching nor the device changes its noise.

    Args:
        diffusion: the model, for its schedule and state size.
        layout: tokens and blocks, (B, S); blocks >= 1 are supervised.
        rule: how to draw.

    Returns:
        The draws, on the layout's device.
    """
    device = layout.tokens.device
    examples = [
        _Example(blocks, keyed_generator(*key, "train"), rule.draws)
        for blocks, key in zip(layout.blocks.cpu().numpy(), rule.keys, strict=True)
    ]
    width = max(len(example.positions) for example in examples)
    batch = _Batch(examples, width, device)
    u = batch.stack([example.uniform() for example in examples])
    noise = diffusion.parametrization.noise(batch)
    drops = [
        example.random.random(len(example.positions) if rule.dropout_per == "token" else 1) for example in examples
    ]
    kept = [np.broadcast_to(d >= rule.class_dropout, len(e.positions)) for d, e in zip(drops, examples, strict=True)]
    counts = torch.tensor([len(example.positions) for example in examples], device=device)
    t = diffusion.schedule.sample_times(u)
    share = rule.self_conditioning if diffusion.parametrization.uses_previous else 0.0
    return Draws(
        positions=batch.stack([example.positions for example in examples]),
        valid=torch.arange(width, device=device) < counts[:, None],
        t=t,
        noise=noise,
        kept=batch.stack(kept),
        first_t=diffusion.schedule.noisier(t) if rule.is_first_noisier else t,
        conditioned=torch.tensor([bool(share and e.random.random() < share) for e in examples], device=device),
    )


class _Example:
    """Supervised positions of one example and its own random numbers."""

    def __init__(self, blocks: Any, random: np.random.Generator, draws: int) -> None:
        where = np.flatnonzero(blocks >= 1)
        self.random, self._draws = random, draws
        self._numbers, self._block = np.unique(blocks[where], return_inverse=True)
        self.positions = np.tile(where, draws)

    def uniform(self) -> Any:
        """A number per position; tokens of one block share theirs."""
        numbers = self.random.random((self._draws, len(self._numbers)), dtype=np.float32)
        return numbers[:, self._block].reshape(-1)


class _Batch:
    """Random numbers of a batch of examples, each from its own generator."""

    def __init__(self, examples: list[_Example], width: int, device: torch.device) -> None:
        self._examples, self._width, self.device = examples, width, device

    def stack(self, parts: list[Any]) -> Tensor:
        out = np.zeros((len(parts), self._width, *parts[0].shape[1:]), dtype=parts[0].dtype)
        for i, part in enumerate(parts):
            out[i, : len(part)] = part
            out[i, len(part) :] = part[-1:]  # no backbone is asked about a slot it could not answer for
        return torch.from_numpy(out).to(self.device)

    def uniform(self) -> Tensor:
        return self.stack([e.random.random(len(e.positions), dtype=np.float32) for e in self._examples])

    def normal(self, size: int) -> Tensor:
        return self.stack(
            [e.random.standard_normal((len(e.positions), size), dtype=np.float32) for e in self._examples]
        )

    def seeds(self) -> Tensor:
        return self.stack([e.random.integers(2**63, size=len(e.positions)) for e in self._examples]).cpu()


@naming_plugins()
def denoising_loss(
    diffusion: Diffusion,
    layout: Layout,
    draws: Draws,
    *,
    classes: Tensor | None = None,
    counted: Tensor | None = None,
    chunk: int = 1024,
) -> Losses:
    """Cross-entropy of the clean tokens given their noisy states, without weighting in t.

    Args:
        diffusion: the model.
        layout: tokens and blocks, (B, S).
        draws: positions, times and noise.
        classes: class of each row, (B,), int64, -1 for none; None for none at all.
        counted: denoised slots whose loss counts, (B, S), bool; all when None.
        chunk: positions per pass of the vocabulary head, which bounds memory to chunk x V.

    Returns:
        The losses.

    Source: arXiv:2501.15781, Eq. 4; arXiv:2502.13917, Eq. 3 and 6.
    """
    query = _query(diffusion, layout, draws, classes)
    if bool(draws.conditioned.any()):
        query = query.replace(previous=_first_prediction(diffusion, layout, draws, classes))
    chosen = draws.valid if counted is None else draws.valid & counted.gather(1, draws.positions)
    features = diffusion.features(query)[chosen]
    count = int((layout.blocks >= 1).sum() if counted is None else (counted & (layout.blocks >= 1)).sum())
    copies = len(features) // max(count, 1)
    targets = layout.tokens.gather(1, draws.positions)[chosen]
    total, tokens = chunked_cross_entropy(diffusion.backbone.head, features, targets, chunk=chunk)
    row, _ = chosen.nonzero(as_tuple=True)
    return Losses(total / max(copies, 1), tokens, draws.t[chosen], count, row, draws.positions[chosen])


def _query(diffusion: Diffusion, layout: Layout, draws: Draws, classes: Tensor | None) -> Query:
    return Query(
        x=diffusion.diffuse(layout.tokens.gather(1, draws.positions), draws.t, draws.noise),
        t=draws.t,
        positions=draws.positions,
        context=diffusion.backbone.read(layout),
        condition=None if classes is None else torch.where(draws.kept, classes[:, None], -1),
    )


@torch.no_grad()
def _first_prediction(diffusion: Diffusion, layout: Layout, draws: Draws, classes: Tensor | None) -> Tensor:
    """What the parametrization remembers of a prediction from the same noise; of zeros in rows that are shown none."""
    rows = draws.conditioned.nonzero()[:, 0]
    taken = Draws(**{name: value[rows] for name, value in vars(draws).items()})
    query = _query(
        diffusion,
        Layout(layout.tokens[rows], layout.blocks[rows]),
        replace(taken, t=taken.first_t),
        None if classes is None else classes[rows],
    )
    backbone, space = diffusion.backbone, diffusion.parametrization
    table = backbone.table()
    answer = Logits(diffusion.features(query), backbone.vocab_size, backbone.head)
    memory = torch.cat([space.remember(logits, table) for _, logits in answer.parts()], 1)
    nothing = space.remember(memory.new_zeros(1, 1, backbone.vocab_size), table)
    out = nothing.expand(len(layout.tokens), memory.shape[1], -1).clone()
    out[rows] = memory
    return out


def chunked_cross_entropy(head: nn.Module, features: Tensor, targets: Tensor, *, chunk: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy without ever holding the logits of more than `chunk` positions.

    The gradient of each chunk is taken at once, so that no logits are kept or computed twice.

    Args:
        head: maps (1, n, H) to logits (1, n, V).
        features: (N, H).
        targets: token ids, (N,), int64.
        chunk: positions per pass.

    Returns:
        The sum, (), differentiable in `features` and the trainable parameters of `head`, and every loss, (N,).
    """
    if not torch.is_grad_enabled():
        parts = [_losses(head, f, y) for f, y in zip(features.split(chunk), targets.split(chunk), strict=True)]
        losses = torch.cat(parts) if parts else features.new_zeros(0, dtype=torch.float32)
        return losses.sum(), losses
    parameters = [p for p in head.parameters() if p.requires_grad]
    return _Chunked.apply(head, chunk, features, targets, *parameters)  # type: ignore[no-any-return, no-untyped-call]


def _losses(head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(head(features[None]).squeeze(0).float(), targets, reduction="none")


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
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
