"""What happens to the tokens while the solver moves: when they settle, what they cost, whether they leave the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2d_framework.config import SamplingSection
from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.diffusion.sampler import Sampler
from l2d_framework.evaluation.diagnosis.batches import Batch
from l2d_framework.models.diffusion_lm import DiffusionLM


@dataclass(frozen=True)
class Trajectories:
    """Likeliest tokens along the way; L positions of B rows, true tokens before them given."""

    times: list[float]  # of each evaluation, the read-out last
    tokens: Tensor  # at each evaluation, (evaluations, B, L), int64
    base: Tensor  # of the base model, or of the first evaluation where the network has none in it, (B, L), int64

    @property
    def settled(self) -> Tensor:
        """Whether a token is, from this evaluation on, what it is in the end, (evaluations, B, L), bool."""
        same = self.tokens == self.tokens[-1]
        return same.flip(0).long().cumprod(0).flip(0).bool()


@torch.no_grad()
def solve(model: DiffusionLM, batch: Batch, context: Any, sampling: SamplingSection) -> Trajectories:
    """Solve every position from noise of its own and note the likeliest token at every evaluation."""
    times: list[float] = []
    tokens: list[Tensor] = []

    def note(evaluation: Evaluation) -> None:
        times.append(float(evaluation.t.flatten()[0]))
        tokens.append(evaluation.logits.argmax(-1).cpu())

    Sampler.of(model, sampling, note)(batch.block(context))
    if not model.backbone.identity_at_zero:
        return Trajectories(times, torch.stack(tokens), tokens[0])
    plain = Sampler.of(model, sampling.model_copy(update={"num_inference_steps": 0}))(batch.block(context))
    base = torch.cat([logits.argmax(-1) for _, logits in plain.logits.parts()], 1)
    return Trajectories(times, torch.stack(tokens), base.cpu())


@torch.no_grad()
def evaluations(model: DiffusionLM, batch: Batch, context: Any, sampling: SamplingSection) -> list[int]:
    """What an adaptive solver spends."""
    return list(Sampler.of(model, sampling)(batch.block(context)).evaluations[batch.valid].tolist())
