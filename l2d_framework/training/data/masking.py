"""Which tokens of a plain text are to be generated: the UL2 mixture of spans and prefixes.

Source: UL2, arXiv:2205.05131; as drawn by TESS 2, arXiv:2502.13917, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from l2d_framework.diffusion.rng import keyed_generator

Mask = npt.NDArray[np.bool_]
Objective = Literal["t5", "aggressive_t5", "prefix"]


def span_mask(
    length: int, ratio: float, mean_span: int, random: np.random.Generator, *, exact_lengths: bool = False
) -> Mask:
    """Mask spans of random lengths at random places; True where masked, (length,).

    floor(length * ratio) tokens are masked, in floor(masked / mean_span) spans. Masked and visible tokens are each
    split into as many random pieces, which alternate: the first token is visible, the last one masked. With
    `exact_lengths` spans have `mean_span` tokens and the last one the remainder, too.
    """
    masked = min(max(int(length * ratio), 1), length - 1)
    visible = length - masked
    spans = min(max(masked // mean_span, 1), visible)
    if exact_lengths:
        pieces = np.full(spans, min(mean_span, masked))
        pieces[-1] += masked - pieces.sum()
    else:
        pieces = _split(masked, spans, random)
    gaps = _split(visible, spans, random)
    return np.repeat(np.tile([False, True], spans), np.column_stack([gaps, pieces]).ravel())


def _split(count: int, pieces: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    # Lengths of non-empty pieces; all ways to cut are equally likely.
    is_cut = random.permutation(np.arange(count - 1) < pieces - 1)
    return np.diff([0, *(np.flatnonzero(is_cut) + 1), count])


def prefix_mask(length: int, random: np.random.Generator | None) -> Mask:
    """Mask everything after a prefix of at most half the text, never the first token, always the last.

    The prefix's length is uniform; without `random` the longest one, on which models are evaluated. True where masked.
    """
    half = (length - 1) // 2
    prefix = half if random is None else int(random.integers(1, max(half, 2)))
    return np.arange(length) > min(prefix, length - 2)


_SPANS: dict[Objective, tuple[float, tuple[int, ...]]] = {"t5": (0.15, (8, 3)), "aggressive_t5": (0.5, (8, 3, 48))}
"""Share to mask and mean lengths of spans; of all other objectives a prefix is seen."""


@dataclass(frozen=True)
class Masker:
    """Masks of a whole run: one objective per update, one mask per example and epoch.

    What an example gets depends on the seed and on its place in the run only, not on processes or micro-batches.
    """

    objectives: tuple[Objective, ...]
    batch_size: int
    seed: int
    exact_lengths: bool = False

    def objective(self, update: int) -> Objective:
        """Objective of one update."""
        return self.objectives[keyed_generator(self.seed, update, "objective").integers(len(self.objectives))]

    def __call__(self, row: Mapping[str, Any]) -> Mask:
        """Where an example is masked, (S,), bool; a row without `ordinal` is held out and gets the evaluation mask."""
        length = len(row["input_ids"])
        if "ordinal" not in row:
            return prefix_mask(length, None)
        random = keyed_generator(self.seed, row["epoch"], row["index"], "mask")
        objective = self.objective(row["ordinal"] // self.batch_size)
        if objective not in _SPANS:
            return prefix_mask(length, random)
        ratio, means = _SPANS[objective]
        mean = means[random.integers(len(means))]
        return span_mask(length, ratio, mean, random, exact_lengths=self.exact_lengths)
