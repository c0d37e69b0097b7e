"""What training adds to the tokens of a batch: times and noise, drawn for each example from its own stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from l2d_framework.blame import naming_plugins
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.rng import keyed_generator
from l2d_framework.types import Layout


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
        fixed_times: whether times are those of `NoiseLaw.fixed_times`, for losses that are compared while it learns.
        is_first_noisier: whether that prediction is made one step nearer to the noise, as in training, or at the same
            time, as the authors evaluate.
    """

    keys: Sequence[tuple[int | str, ...]]
    draws: int = 1
    class_dropout: float = 0.0
    dropout_per: Literal["token", "example"] = "token"
    self_conditioning: float = 0.0
    fixed_times: bool = False
    is_first_noisier: bool = True


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
    schedule = diffusion.schedule
    t = schedule.fixed_times(u) if rule.fixed_times else schedule.sample_times(u)
    share = rule.self_conditioning if diffusion.parametrization.uses_previous else 0.0
    return Draws(
        positions=batch.stack([example.positions for example in examples]),
        valid=torch.arange(width, device=device) < counts[:, None],
        t=t,
        noise=noise,
        kept=batch.stack(kept),
        first_t=schedule.noisier(t) if rule.is_first_noisier else t,
        conditioned=torch.tensor([bool(share and e.random.random() < share) for e in examples], device=device),
    )


class _Example:
    """Supervised positions of one example and its own random numbers."""

    def __init__(self, blocks: Any, random: np.random.Generator, draws: int) -> None:
        where = np.flatnonzero(blocks >= 1)
        self.random, self._draws = random, draws
        self._numbers, self._block = np.unique(blocks[where], return_inverse=True)
        self.positions = np.concatenate([where] * draws)

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
