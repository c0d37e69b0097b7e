"""The denoising loss: cross-entropy of clean tokens given their noisy states, at supervised positions only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from l2d_framework.blame import naming_plugins
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.training_noise import Draws
from l2d_framework.types import Layout, Query

Refine = Callable[[Tensor, slice], Tensor]
"""Changes the logits, (1, n, V), of the positions in a slice."""


@dataclass(frozen=True)
class Losses:
    """Cross-entropies of one batch.

    Attributes:
        total: sum over supervised tokens of the mean over draws, in nats, (), float32; differentiable.
        tokens: loss of every draw, its cross-entropy times the schedule's weight, (N,), float32, detached.
        cross_entropies: of every draw without the weight, (N,), float32, detached; the same tensor where all are 1.
        t: time of every draw, (N,), float32.
        count: supervised tokens.
        row: row of every draw, (N,), int64.
        position: slot of every draw, (N,), int64.
    """

    total: Tensor
    tokens: Tensor
    cross_entropies: Tensor
    t: Tensor
    count: int
    row: Tensor
    position: Tensor


@naming_plugins()
def denoising_loss(
    diffusion: Diffusion,
    layout: Layout,
    draws: Draws,
    *,
    classes: Tensor | None = None,
    counted: Tensor | None = None,
    chunk: int = 1024,
    in_step: bool = False,
) -> Losses:
    """Cross-entropy of the clean tokens given their noisy states, weighted by the schedule.

    Args:
        diffusion: the model.
        layout: tokens and blocks, (B, S).
        draws: positions, times and noise.
        classes: class of each row, (B,), int64, -1 for none; None for none at all.
        counted: denoised slots whose loss counts, (B, S), bool; all when None.
        chunk: positions per pass of the vocabulary head, which bounds memory to chunk x V.
        in_step: make as many passes of the network whatever was drawn, since other processes wait for their weights.

    Returns:
        The losses.

    Source: arXiv:2501.15781, Eq. 4; arXiv:2502.13917, Eq. 3 and 6.
    """
    if diffusion.refines:
        diffusion.forget_codebook()  # its weights may have changed without a trace since the last update
    query = _query(diffusion, layout, draws, classes)
    is_shown = bool(draws.conditioned.any())
    if is_shown or (in_step and diffusion.parametrization.uses_previous):
        previous = _first_prediction(diffusion, layout, draws, classes)
        query = query.replace(previous=previous if is_shown else None)
    chosen = draws.valid if counted is None else draws.valid & counted.gather(1, draws.positions)
    features = diffusion.features(query)[chosen]
    count = int((layout.blocks >= 1).sum() if counted is None else (counted & (layout.blocks >= 1)).sum())
    copies = len(features) // max(count, 1)
    targets = layout.tokens.gather(1, draws.positions)[chosen]
    head = diffusion.backbone.head
    t = draws.t[chosen]
    weights = diffusion.schedule.weight(t)
    total, entropies = chunked_cross_entropy(
        head,
        features,
        targets,
        chunk=chunk,
        weights=weights,
        refine=refining(diffusion, query.x[chosen], t) if diffusion.refines else None,
    )
    row, _ = chosen.nonzero(as_tuple=True)
    tokens = entropies if weights is None else weights * entropies
    return Losses(total / max(copies, 1), tokens, entropies, t, count, row, draws.positions[chosen])


def refining(diffusion: Diffusion, x: Tensor, t: Tensor) -> Refine:
    """How the state space changes logits about N positions, given their states, (N, D), and times, (N,)."""
    return lambda logits, part: diffusion.refine(logits, x[None, part], t[None, part])


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
    asked = rows if len(rows) else rows.new_zeros(1)  # for nobody, since other processes make theirs
    taken = Draws(**{name: value[asked] for name, value in vars(draws).items()})
    query = _query(
        diffusion,
        Layout(layout.tokens[asked], layout.blocks[asked]),
        replace(taken, t=taken.first_t),
        None if classes is None else classes[asked],
    )
    space, table = diffusion.parametrization, diffusion.backbone.table()
    memory = torch.cat([space.remember(logits, table) for _, logits in diffusion.answer(query).parts()], 1)
    nothing = space.remember(memory.new_zeros(1, 1, diffusion.backbone.vocab_size), table)
    out = nothing.expand(len(layout.tokens), memory.shape[1], -1).clone()
    out[rows] = memory[: len(rows)]
    # Weights that autocast has cast here must not be taken for those of the pass that learns: all would get their
    # gradients at the end of backward, each kept in half precision until then, and in shares none at all.
    torch.clear_autocast_cache()
    return out


def chunked_cross_entropy(
    head: nn.Module,
    features: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    weights: Tensor | None = None,
    refine: Refine | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy without ever holding the logits of more than `chunk` positions.

    The gradient of each chunk is taken at once, so that no logits are kept or computed twice, and in their own memory:
    on CUDA by one kernel of liger-kernel where that is installed.

    Args:
        head: maps (1, n, H) to logits (1, n, V).
        features: (N, H).
        targets: token ids, (N,), int64.
        chunk: positions per pass.
        weights: of each position in the sum, (N,); all 1 when None.
        refine: changes logits before the loss; nothing when None.

    Returns:
        The weighted sum, (), differentiable in `features` and the trainable parameters of `head`, and every
        loss without its weight, (N,).
    """

    def logits(part: slice, of: Tensor) -> Tensor:
        found = head(of[None]).float()
        return (found if refine is None else refine(found, part)).squeeze(0)

    parts = [slice(start, start + chunk) for start in range(0, len(features), chunk)]
    if torch.is_grad_enabled():
        parameters = [p for p in head.parameters() if p.requires_grad]
        return _Chunked.apply(logits, parts, targets, weights, features, *parameters)  # type: ignore[no-any-return, no-untyped-call]
    found = [_exponentials(logits(part, features[part].clone()), targets[part])[0] for part in parts]
    each = torch.cat(found) if found else features.new_zeros(0, dtype=torch.float32)
    return _sum(each, weights), each


def _sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    # No product of matrices, which autocast would round to half precision.
    return losses.sum() if weights is None else (losses * weights).sum()


def _exponentials(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies, (n,), of logits, (n, V), which become exponentials with the sums that are returned, (n, 1)."""
    top = logits.amax(-1, keepdim=True)
    behind = top - logits.gather(-1, targets[:, None])
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return (total.log() + behind)[:, 0], total


def _slopes(logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropies, (n,), of logits, (n, V), and gradients of their weighted sum, in the memory of the logits."""
    if _has_kernel(logits):
        each, slope = _in_one_kernel(logits, targets)
        return each, slope if weights is None else slope.mul_(weights[:, None])
    each, total = _exponentials(logits, targets)
    weight = torch.ones_like(total) if weights is None else weights[:, None]
    return each, logits.mul_(weight / total).scatter_add_(-1, targets[:, None], -weight)


def _has_kernel(logits: Tensor) -> bool:
    # What only says that it is on a GPU, as the shapes of a dry run do, has no memory to write to.
    return type(logits) is Tensor and logits.is_cuda and _is_right(logits.device)


def _in_one_kernel(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What `_slopes` returns of weights of one, from liger-kernel, which does it for every head in two passes."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    # No weights of classes, no token ignored, neither z-loss nor smoothing, no soft cap but the head's own.
    each, *_, slope = cross_entropy_forward(logits.requires_grad_(), targets, None, -100, 0.0, 0.0, "none", None, False)
    slope = slope.detach()
    slope[:0].zero_()  # autograd does not see what a kernel writes, and would read logits that are no more
    return each, slope


@cache
def _is_right(device: torch.device) -> bool:
    """Whether liger-kernel is installed and gives what the plain way does; its function is not a public one."""
    if find_spec("liger_kernel") is None:
        return False
    logits, targets = torch.linspace(-2, 3, 24, device=device).view(3, 8), torch.tensor([1, 0, 7], device=device)
    each, total = _exponentials(wanted := logits.clone(), targets)
    wanted.div_(total).scatter_add_(-1, targets[:, None], -torch.ones_like(total))
    try:
        with torch.no_grad():
            found = _in_one_kernel(logits, targets)
        is_close = torch.allclose(found[0], each, atol=1e-4) and torch.allclose(found[1], wanted, atol=1e-4)
        reason = "" if is_close else "it differs from what torch computes"
    except Exception as error:  # whatever another release, compilers and drivers raise
        reason = f"{type(error).__name__}: {error}"
    if reason:
        what = f"liger-kernel's cross-entropy is not used on {device}: {reason}."
        advice = "Training is the same, and takes longer; l2d-framework[kernels] has the release that was tried."
        warnings.warn(f"{what} {advice}", UserWarning, stacklevel=2)
    return not reason


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Callable[[slice, Tensor], Tensor],
        parts: Sequence[slice],
        targets: Tensor,
        weights: Tensor | None,
        features: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.zeros_like(features)
        own = [torch.zeros_like(p) for p in parameters]
        each = features.new_zeros(len(features), dtype=torch.float32)
        for part in parts:
            with torch.enable_grad():
                leaf = features[part].detach().clone().requires_grad_()  # lest a head hand it on to be written over
                made = logits(part, leaf)
            # A second copy of the logits would be the largest tensor of all.
            each[part], slope = _slopes(made.detach(), targets[part], None if weights is None else weights[part])
            found = torch.autograd.grad(made, [leaf, *parameters], slope, allow_unused=True)
            gradient[part] = found[0]
            for sum_, piece in zip(own, found[1:], strict=True):
                if piece is not None:
                    sum_ += piece
        ctx.save_for_backward(gradient, *own)
        ctx.mark_non_differentiable(each)
        return _sum(each, weights), each

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Any, ...]:
        gradient, *own = ctx.saved_tensors
        return (None, None, None, None, gradient * outputs[0], *(piece * outputs[0] for piece in own))
