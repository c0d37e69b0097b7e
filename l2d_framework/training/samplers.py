"""The order in which a run sees its examples: one sequence for the whole run, whatever the number of processes.

Batches are cut from this sequence, and each example carries its own epoch. Therefore neither accumulation, nor
resumption, nor the border between epochs can change which examples an update sees or which noise they get. Each also
carries its `ordinal`, its place in the sequence: the update it belongs to is ordinal // batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from l2d_framework.diffusion.rng import keyed_generator
from l2d_framework.errors import DataError

PADDING = -1
"""Index of an example that only fills up the last batch of an evaluation."""


class RunOrder(Dataset[dict[str, Any]]):
    """Every example of a run in order; each epoch is a permutation keyed by (seed, epoch)."""

    def __init__(self, rows: Any, seed: int, total: int) -> None:
        self._rows, self._seed, self._total = rows, seed, total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, ordinal: int) -> dict[str, Any]:
        return self.__getitems__([ordinal])[0]

    def __getitems__(self, ordinals: list[int]) -> list[dict[str, Any]]:
        places = [divmod(ordinal, len(self._rows)) for ordinal in ordinals]
        chosen = [int(_permutation(self._seed, epoch, len(self._rows))[place]) for epoch, place in places]
        rows = zip(_fetch(self._rows, chosen), places, ordinals, strict=True)
        return [{**row, "epoch": epoch, "ordinal": ordinal} for row, (epoch, _), ordinal in rows]


def _fetch(rows: Any, places: list[int]) -> list[dict[str, Any]]:
    """Rows, all at once where they can be had so: `datasets` reads 128 four times as fast."""
    if hasattr(rows, "__getitems__"):
        return list(rows.__getitems__(places))
    return [rows[place] for place in places]


@lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def _permutation(seed: int, epoch: int, count: int) -> Any:
    return keyed_generator(seed, epoch, "order").permutation(count).astype(np.int64)


class RunStream(IterableDataset[dict[str, Any]]):
    """Every example of a run from a stream, which starts again when it ends."""

    def __init__(self, rows: Any, total: int) -> None:
        self._rows, self._total = rows, total

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, seen = 0, 0
        while seen < self._total:
            self._rows.set_epoch(epoch)
            before = seen
            for row in self._rows:
                yield {**row, "epoch": epoch, "ordinal": seen}
                seen += 1
                if seen == self._total:
                    return
            if seen == before:
                raise DataError(f"The training stream ended without an example in epoch {epoch}. Check data.train.")
            epoch += 1


class HeldOut(Dataset[dict[str, Any]]):
    """Examples to evaluate on, a stream's read into memory, filled up to a multiple: whole batches for all."""

    def __init__(self, rows: Any, multiple: int) -> None:
        self._rows = rows if hasattr(rows, "__len__") else list(rows)
        self._length = -(-len(self._rows) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        count = len(self._rows)
        rows = _fetch(self._rows, [place if place < count else 0 for place in places])
        return [
            {**row, "epoch": 0, **({} if place < count else {"index": PADDING})}
            for row, place in zip(rows, places, strict=True)
        ]
