"""Diffusion: schedule, parametrization and backbone put together into the one equation of the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l2d_framework.backbone import Backbone
from l2d_framework.diffusion.logits import Logits
from l2d_framework.parametrization import Parametrization
from l2d_framework.schedule import NoiseLaw
from l2d_framework.types import Prediction, Query


class Diffusion(nn.Module):
    """A network that predicts clean tokens from noisy states; itself a `Predict`, the innermost one.

    Args:
        schedule: the law of noise.
        parametrization: the state space.
        backbone: the network.
        block_size: tokens denoised together; None for one block per sequence.
    """

    def __init__(
        self, schedule: NoiseLaw, parametrization: Parametrization, backbone: Backbone, block_size: int | None = 1
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.parametrization = parametrization
        self.backbone = backbone.in_blocks(block_size)
        self.block_size = block_size
        self._codebook: tuple[object, Tensor] | None = None
        self._sums: list[float] = []

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """The parametrization's constant for generation, computed again only after a weight has changed."""
        weights = [*self.parametrization.parameters(), self.backbone.table()]
        state = [(weight.data_ptr(), weight._version, weight.dtype, weight.device) for weight in weights]
        made = self._codebook
        if made is None or made[0] != state:
            made = self._codebook = state, self.parametrization.codebook(self.backbone.table())
        return made[1]

    @torch.no_grad()
    def check_codebook(self) -> None:
        """Forget the codebook if weights of the state space have changed without a trace, as some optimizers do it."""
        sums = [float(weight.sum(dtype=torch.float64)) for weight in self.parametrization.parameters()]
        if sums != self._sums:
            self._sums = sums
            self.forget_codebook()

    def forget_codebook(self) -> None:
        """Have the codebook made again when it is next asked for."""
        self._codebook = None

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes and checkpoints store; the language model's own only if the backbone trains it."""
        if self.backbone.trains_lm:
            return dict(self.named_parameters())
        frozen = {id(parameter) for parameter in self.backbone.lm.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) not in frozen}

    def diffuse(self, tokens: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noisy states, (B, L, D), of tokens at times t with standard normal noise; gradients reach the projection."""
        return self.parametrization.corrupt(tokens, noise, t, self.schedule, self.backbone.table())

    def features(self, query: Query) -> Tensor:
        """Hidden states about the queried positions, (B, L, H), before the vocabulary head."""
        if query.shared_time == 0.0 and self.backbone.identity_at_zero:
            return self.backbone.plain(query.positions, query.context)
        h = self.parametrization.embed(query.x, query.t, self.schedule, self.backbone.table(), query.previous)
        if query.carried is not None:
            h = h + self.backbone.carry(query.carried)
        # Handed over only where it is asked for, so that a backbone which compiles nothing need not know of it.
        compiled: dict[str, Any] = {"compiled": True} if query.compiled else {}
        return self.backbone.features(
            h, query.t, query.positions, query.context, query.condition, shared_time=query.shared_time, **compiled
        )

    def forward(self, query: Query) -> Prediction:
        """Predict without guidance, logits in float32."""
        features = self.features(query)
        logits = self.backbone.head(features).float()
        logits = self.refine(logits, query.x, query.t) if self.refines else logits
        return Prediction(logits, hidden=features if self.backbone.carries else None)

    @property
    def refines(self) -> bool:
        """Whether the state space has something to say about logits."""
        return self.parametrization.refines

    def refine(self, logits: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Logits of some positions, (B, n, V), float32, after what their states say of their tokens."""
        return self.parametrization.refine(logits, x.detach(), t, self.schedule, self.codebook())

    def answer(self, query: Query) -> Logits:
        """Predict without guidance, a few positions at a time unless the state space refines all logits."""
        return self.answer_from(self.features(query), query)

    def answer_from(self, features: Tensor, query: Query) -> Logits:
        """What `answer` makes of hidden states, (B, L, H), that `features` has given about the same query."""
        size, head = self.backbone.vocab_size, self.backbone.head
        if self.refines:
            return Logits(self.refine(head(features).float(), query.x, query.t), size)
        return Logits(features, size, head)

    def together(self, queries: list[Query]) -> list[Prediction]:
        """Answer queries that share positions and context in one pass of the network."""
        joined, dim = _join(queries, 1 if self.backbone.independent_positions else 0)
        found = self.forward(joined)
        parts = found.logits.chunk(len(queries), dim)
        hidden = [None] * len(queries) if found.hidden is None else found.hidden.chunk(len(queries), dim)
        return [Prediction(part, hidden=state) for part, state in zip(parts, hidden, strict=True)]


def _join(queries: list[Query], dim: int) -> tuple[Query, int]:
    """One query whose dimension `dim` lists all of `queries`; along rows the context is repeated."""
    first = queries[0]
    context = first.context
    if dim == 0:
        rows = torch.arange(first.x.shape[0], device=first.x.device).repeat(len(queries))
        context = context.select(rows)
    conditions = [_unconditional(q.t) if q.condition is None else q.condition for q in queries]
    previous = [q.previous for q in queries]
    carried = [q.carried for q in queries]
    joined = first.replace(
        x=torch.cat([q.x for q in queries], dim),
        t=torch.cat([q.t for q in queries], dim),
        positions=torch.cat([q.positions for q in queries], dim),
        context=context,
        condition=torch.cat(conditions, dim),
        previous=None if previous[0] is None else torch.cat([p for p in previous if p is not None], dim),
        carried=None if carried[0] is None else torch.cat([c for c in carried if c is not None], dim),
        shared_time=first.shared_time if all(q.shared_time == first.shared_time for q in queries) else None,
        guidance_scale=None,
    )
    return joined, dim


def _unconditional(t: Tensor) -> Tensor:
    return torch.full_like(t, -1, dtype=torch.int64)
