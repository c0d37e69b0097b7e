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


@dataclass(frozen=True)
class Solves:
    """Rows of a batch that are solved from noise, each in a number of evaluations of its own, the most first.

    Attributes:
        rows: which row of the batch each is, (B,), int64.
        counts: evaluations of each, falling.
        positions: supervised slots, (B, L), int64; those not valid repeat the row's last.
        valid: (B, L), bool.
        kept: True where a class label is kept, (B, L), bool.
        random: what the solves draw.
    """

    rows: Tensor
    counts: list[int]
    positions: Tensor
    valid: Tensor
    kept: Tensor
    random: ExampleStreams


def draw_solves(layout: Layout, rule: NoiseRule, *, fewest: int, most: int) -> Solves:
    """Solves of every supervised position; each example draws from its own stream, as in `draw`.

    Args:
        layout: tokens and blocks, (B, S); blocks >= 1 are supervised.
        rule: how to draw; what it says of times and first predictions has no meaning here.
        fewest: least number of evaluations of an example.
        most: largest number; all in between are equally likely.

    Returns:
        The solves, on the layout's device.
    """
    examples = _examples(layout, rule, "solve")
    counts = [int(example.random.integers(fewest, most + 1)) for example in examples]
    order = sorted(range(len(examples)), key=lambda row: -counts[row])
    random = ExampleStreams([examples[row] for row in order], layout.tokens.device)
    return Solves(
        rows=torch.tensor(order, device=random.device),
        counts=[counts[row] for row in order],
        positions=random.positions(),
        valid=random.valid(),
        kept=random.kept(rule),
        random=random,
    )


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
    examples = _examples(layout, rule, "train")
    batch = ExampleStreams(examples, layout.tokens.device)
    u = batch.stack([example.uniform() for example in examples])
    noise = diffusion.parametrization.noise(batch)
    kept = batch.kept(rule)
    schedule = diffusion.schedule
    t = schedule.fixed_times(u) if rule.fixed_times else schedule.sample_times(u)
    share = rule.self_conditioning if diffusion.parametrization.uses_previous else 0.0
    return Draws(
        positions=batch.positions(),
        valid=batch.valid(),
        t=t,
        noise=noise,
        kept=kept,
        first_t=schedule.noisier(t) if rule.is_first_noisier else t,
        conditioned=torch.tensor([bool(share and e.random.random() < share) for e in examples], device=batch.device),
    )


def _examples(layout: Layout, rule: NoiseRule, purpose: str) -> list[_Example]:
    blocks = layout.blocks.cpu().numpy()
    rows, places = np.nonzero(blocks >= 1)
    # Blocks of all rows at once, since numpy takes as long to find those of one.
    names = rows * (blocks.max() + 1) + blocks[rows, places]
    found, block = np.unique(names, return_inverse=True)
    borders = np.arange(len(blocks) + 1)
    ends = np.searchsorted(rows, borders)
    firsts = np.searchsorted(found, borders * (blocks.max() + 1))
    return [
        _Example(
            places[ends[row] : ends[row + 1]],
            block[ends[row] : ends[row + 1]] - firsts[row],
            int(firsts[row + 1] - firsts[row]),
            keyed_generator(*key, purpose),
            rule.draws,
        )
        for row, key in zip(range(len(blocks)), rule.keys, strict=True)
    ]


class _Example:
    """Supervised positions of one example, the block of each, and its own random numbers."""

    def __init__(self, where: Any, block: Any, blocks: int, random: np.random.Generator, draws: int) -> None:
        self.random, self._shape, self._block = random, (draws, blocks), block
        self.positions = np.concatenate([where] * draws)

    def uniform(self) -> Any:
        """A number per position; tokens of one block share theirs."""
        return self.random.random(self._shape, dtype=np.float32)[:, self._block].reshape(-1)


class ExampleStreams:
    """`Random` of a batch of examples, each with its own generator, about their supervised positions."""

    def __init__(self, examples: list[_Example], device: torch.device, width: int | None = None) -> None:
        self._examples, self.device = examples, device
        self._width = max(len(example.positions) for example in examples) if width is None else width

    def first(self, rows: int) -> ExampleStreams:
        """Those of the first examples; the streams of the others stay where they are."""
        return ExampleStreams(self._examples[:rows], self.device, self._width)

    def positions(self) -> Tensor:
        """Supervised slots, (B, L), int64."""
        return self.stack([example.positions for example in self._examples])

    def valid(self) -> Tensor:
        """Which of them are there, (B, L), bool."""
        counts = torch.tensor([len(example.positions) for example in self._examples], device=self.device)
        return torch.arange(self._width, device=self.device) < counts[:, None]

    def kept(self, rule: NoiseRule) -> Tensor:
        """Where a class label is kept, (B, L), bool, by the next numbers."""
        drops = [e.random.random(len(e.positions) if rule.dropout_per == "token" else 1) for e in self._examples]
        return self.stack([drop >= rule.class_dropout for drop in drops])

    def stack(self, parts: list[Any]) -> Tensor:
        """One row of values for each example, (B, L, ...), which its last value fills up."""
        lengths = np.array([[len(part)] for part in parts])
        ends = lengths.cumsum(0)
        # No backbone is asked about a slot it could not answer for.
        index = np.minimum(ends - lengths + np.arange(self._width), ends - 1)
        return torch.from_numpy(np.concatenate(parts)[index]).to(self.device)

    def uniform(self) -> Tensor:
        """Next number of every position, (B, L)."""
        return self.stack([e.random.random(len(e.positions), dtype=np.float32) for e in self._examples])

    def normal(self, size: int) -> Tensor:
        """Next normal numbers of every position, (B, L, size)."""
        return self.stack(
            [e.random.standard_normal((len(e.positions), size), dtype=np.float32) for e in self._examples]
        )

    def seeds(self) -> Tensor:
        """Next seed of every position, (B, L), on the host."""
        return self.stack([e.random.integers(2**63, size=len(e.positions)) for e in self._examples]).cpu()
