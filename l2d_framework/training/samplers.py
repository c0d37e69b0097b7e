"""The order in which a run sees its examples: one sequence for the whole run, whatever the number of processes.

Batches are cut from this sequence, and each example carries its own epoch. Therefore neither accumulation, nor
resumption, nor the border between epochs can change which examples an update sees or which noise they get. Each also
carries its `ordinal`, its place in the sequence: the update it belongs to is ordinal // batch size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from l2d_framework.diffusion.rng import keyed_generator
from l2d_framework.errors import CheckpointError, L2DError
from l2d_framework.training.data.collate import Collator
from l2d_framework.training.data.stream import Place, Stream

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


class Portion(NamedTuple):
    """What a process has of an update that is read from a stream, or why there is nothing, but for a signal."""

    batch: dict[str, Tensor] | None
    places: Mapping[int, Place]
    """Where each shard goes on behind it."""
    failure: L2DError | None = None


class RunStream(IterableDataset[Portion]):
    """What a process has of every update of a run from a stream, which starts again when it ends.

    Each shard gives as many neighbouring rows of an update, so only those that the process has rows of are read.
    """

    def __init__(self, stream: Stream, collate: Collator, *, updates: int, batch_size: int, rows: range) -> None:
        self._stream, self._collate, self._updates, self._batch_size = stream, collate, updates, batch_size
        self._rows = rows
        self._run = batch_size // stream.shards
        """Neighbouring rows of one shard."""
        self.shards = sorted({row // self._run for row in rows})
        self.begun, self.places = 0, dict[int, Place]()
        """Update to begin with, and where each shard goes on behind the last one; the trainer keeps them."""

    def __iter__(self) -> Iterator[Portion]:
        places = {shard: self.places.get(shard, Place()) for shard in self.shards}
        shards = {shard: self._stream.rows(shard, place) for shard, place in places.items()}
        try:
            # Checkpoints from before places were kept are read from the start.
            for update in range(self.begun if self.places else 0, self._updates):
                rows = []
                for row in range(self.shards[0] * self._run, (self.shards[-1] + 1) * self._run):
                    example, places[row // self._run] = next(shards[row // self._run])
                    if row in self._rows:
                        epoch = places[row // self._run].epoch
                        rows.append({**example, "epoch": epoch, "ordinal": update * self._batch_size + row})
                if update >= self.begun:
                    yield Portion(self._collate(rows), dict(places))
        except L2DError as error:
            # Raised here, in a worker perhaps, it would end a run that can still save what it has.
            yield Portion(None, {}, error)

    def write(self, folder: Path) -> None:
        """Write into a checkpoint where shards go on; each by one process."""
        for shard, place in self.places.items():
            if shard * self._run in self._rows:
                (folder / _file(shard)).write_text(
                    json.dumps(place.as_json() | {"parts": self._stream.parts}), encoding="utf-8"
                )

    def resume(self, folder: Path, update: int) -> None:
        """Go on with an update, where a checkpoint says."""
        self.begun = update
        for shard in self.shards:
            if (path := folder / _file(shard)).is_file():
                fields = json.loads(path.read_text(encoding="utf-8"))
                parts, known = fields.pop("parts", None), list(self._stream.parts)
                if parts != known and (parts is not None or self._stream.has_row_groups):
                    raise CheckpointError(
                        f"{str(path)!r} counts parts of {self._stream.name}, which were {parts or 'files'} and are "
                        f"{known} now, so it tells no place in them. Restore the files, or begin anew with --overwrite "
                        "or another output_dir."
                    )
                self.places[shard] = Place.of_json(fields)


def _file(shard: int) -> str:
    return f"stream-{shard}.json"


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
