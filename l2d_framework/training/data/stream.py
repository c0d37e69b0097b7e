"""Rows of a stream, packed, numbered and shuffled in windows, from any place on and whatever its source does.

A shuffle whose order is a function of the place in the stream has no state of its own: where a run stood is told by the
state of the source at the beginning of a window, in `datasets`' own terms, and how many rows of the window were given.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple, Self

import datasets
import numpy as np
from datasets.utils import file_utils

from l2d_framework.diffusion.rng import keyed_generator
from l2d_framework.errors import DataError, L2DError, UnreachableError

ENCODED = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "supervised": datasets.List(datasets.Value("bool")),
        "class_id": datasets.Value("int64"),
    }
)
BATCH = 32
"""Examples that are encoded together."""
WAITS = (5.0, 10.0, 20.0, 40.0, 80.0)
"""Seconds before each new try of a source that does not answer; `datasets` tries for 100 s in each itself."""
_NETWORK = (ConnectionError, TimeoutError, *file_utils.CONNECTION_ERRORS_TO_RETRY)
_MOUNTS = {"EIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO"}
_BUSY = {408, 425, 429}  # of HTTP, besides what begins with 5
_LOGGER = logging.getLogger(__name__)

Row = dict[str, Any]


class Mark(NamedTuple):
    """A place between two encoded examples: what `datasets` says before a batch, and how many of it are behind."""

    state: Any = None
    skip: int = 0


START = Mark()


@dataclass(frozen=True)
class Place:
    """Where a stream goes on."""

    epoch: int = 0
    first: int = 0
    """Rows of the epoch before the window."""
    taken: int = 0
    """Rows of the window that were given."""
    mark: Mark = START
    """Where the window begins in the source."""
    ids: Any = ()
    """Tokens before that which no packed row has had yet."""
    supervised: Any = ()

    def as_json(self) -> dict[str, Any]:
        """Fields that JSON can hold."""
        rest = {name: np.asarray(getattr(self, name)).tolist() for name in ("ids", "supervised")}
        return asdict(replace(self, mark=START, ids=(), supervised=())) | rest | {"mark": list(self.mark)}

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> Self:
        """Inverse of `as_json`."""
        return cls(**{**fields, "mark": Mark(*fields["mark"])})


class _Window(NamedTuple):
    start: Place
    rows: list[Row]


@dataclass(frozen=True)
class Stream:
    """What a streamed source gives to learn.

    Iterating gives the first epoch.
    """

    data: Any
    """Encoded examples, an `IterableDataset`."""
    name: str
    """Of its sources, for messages."""
    length: int | None
    """Tokens of a packed row; None where every example is one."""
    buffer: int
    """Rows in memory to shuffle, in all shards together: a window that is given, and the next that is filled."""
    seed: int
    shards: int = 1
    """Parts that are read side by side."""
    parts: Sequence[int] = ()
    """In how many each source can be read; places in it are counted by them."""
    has_row_groups: bool = False
    """Whether such parts are row groups, which checkpoints of before counted as files."""

    def __iter__(self) -> Iterator[Row]:
        return self.epoch(0)

    def epoch(self, number: int) -> Iterator[Row]:
        """Rows of an epoch, as a `Dataset` gives them; of one shard after the other."""
        for shard in range(self.shards):
            for row, _ in takewhile(lambda one: one[1].epoch == number, self.rows(shard, Place(number))):
                yield row | {name: row[name].tolist() for name in ("input_ids", "supervised")}

    def rows(self, shard: int = 0, place: Place = Place()) -> Iterator[tuple[Row, Place]]:
        """Rows of a shard without end, each with the place behind it.

        Args:
            shard: its number.
            place: where to begin; at most `buffer` rows are read again for it.

        Yields:
            A row and where the shard goes on.
        """
        taken, windows = place.taken, self._windows(shard, replace(place, taken=0))
        filled = filter(None, windows)
        window = next(filled)
        while True:
            start, following = window.start, None
            random = keyed_generator(self.seed, start.epoch, shard, start.first, "window")
            order = random.permutation(len(window.rows))
            for behind, which in enumerate(order[taken:], taken + 1):
                # A row is read for each that is given, so that no update waits for a whole window.
                following = following or next(windows)
                yield window.rows[which], replace(start, taken=behind)
            window, taken = following or next(filled), 0

    def _windows(self, shard: int, place: Place) -> Iterator[_Window | None]:
        """Windows of all epochs, each when its last row has been read, and None for every other row."""
        size = max(self.buffer // (2 * self.shards), 1)
        while True:
            start, rows, here = place, list[Row](), place
            for row, here in self._from(shard, place):
                rows.append({**row, "index": shard + self.shards * (here.first - 1)})
                if len(rows) == size:
                    yield _Window(start, rows)
                    start, rows = here, []
                else:
                    yield None
            if rows:
                yield _Window(start, rows)
            if not here.first:
                raise DataError(f"{self.name} ended without an example in epoch {place.epoch}. Check data.train.")
            place = Place(place.epoch + 1)

    def _from(self, shard: int, place: Place) -> Iterator[tuple[Row, Place]]:
        """The rest of an epoch, each row with the place behind it."""
        # A new object each time: iterating keeps its place in it, and copies share that.
        examples = read(lambda: self.data.shard(self.shards, shard, contiguous=False), self.name, place.mark)
        rest = (place.ids, place.supervised)
        places = packed(examples, self.length, place.mark, rest) if self.length else ((*one, *rest) for one in examples)
        for count, (row, mark, ids, supervised) in enumerate(places, place.first + 1):
            yield row, replace(place, first=count, mark=mark, ids=ids, supervised=supervised)


def packed(
    examples: Iterable[tuple[Row, Mark]], length: int, mark: Mark = START, rest: tuple[Any, Any] = ((), ())
) -> Iterator[tuple[Row, Mark, Any, Any]]:
    """Examples joined and cut into rows of `length` tokens; the last one may be shorter.

    Args:
        examples: each with the place behind it.
        length: of a row.
        mark: place before the examples.
        rest: tokens before the examples, and which of them are supervised.

    Yields:
        A row, the place behind the last example that was read, and what of it is left.
    """
    ids, supervised = np.asarray(rest[0], np.int32), np.asarray(rest[1], np.bool_)
    following = iter(examples)
    while True:
        while len(ids) >= length:
            chunks, ids, supervised = _chunk(ids[:length], supervised[:length]), ids[length:], supervised[length:]
            yield from ((chunk, mark, ids, supervised) for chunk in chunks)
        if (example := next(following, None)) is None:
            break
        row, mark = example
        ids = np.concatenate([ids, row["input_ids"]])
        supervised = np.concatenate([supervised, row["supervised"]])
    yield from ((chunk, mark, ids[:0], supervised[:0]) for chunk in _chunk(ids, supervised))


def _chunk(ids: Any, supervised: Any) -> list[Row]:
    supervised = supervised & (np.arange(len(ids)) > 0)
    # A copy, which does not keep the documents that it comes from.
    return [{"input_ids": ids.copy(), "supervised": supervised, "class_id": -1}] if supervised.any() else []


def read(make: Callable[[], Any], name: str, start: Mark = START) -> Iterator[tuple[Row, Mark]]:
    """Encoded examples, each with the place behind it; a source that does not answer is tried again, later each time.

    Args:
        make: gives an `IterableDataset` of encoded examples that is at its start.
        name: of its sources, for messages.
        start: where to begin.

    Yields:
        An example and where to go on.

    Raises:
        DataError: if it cannot be read on.
        UnreachableError: if it still does not answer at the last try.
        L2DError: whatever an example is refused with.
    """
    failed = 0
    while True:
        stream = make()
        if start.state is not None:
            stream.load_state_dict(start.state)
        try:
            # `iter` instead of iterating: in a worker process the latter mixes sources in another order.
            for batch in stream.iter(batch_size=BATCH):
                yield from unbatched(batch, start)
                start, failed = Mark(stream.state_dict()), 0
            return
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if isinstance(error, L2DError) and not is_passing(error):
                raise
            if not is_passing(error):
                raise DataError(f"{name} cannot be read on: {said}") from error
            if failed == len(WAITS):
                raise UnreachableError(f"{name} does not answer any more, after {failed} new tries: {said}.") from error
            wait, failed = WAITS[failed], failed + 1
            _LOGGER.warning("%s does not answer (%s). New try %d of %d in %g s.", name, said, failed, len(WAITS), wait)
            time.sleep(wait)


def unbatched(batch: Mapping[str, list[Any]], start: Mark) -> Iterator[tuple[Row, Mark]]:
    """Examples of a batch behind a place in it, each with the place behind it."""
    columns = zip(*(batch[name] for name in ENCODED), strict=True)
    for behind, (ids, supervised, class_id) in enumerate(columns, 1):
        if behind > start.skip:
            # Arrays, because a window of lists would take eight times the memory.
            arrays = {"input_ids": np.asarray(ids, np.int32), "supervised": np.asarray(supervised, np.bool_)}
            yield {**arrays, "class_id": class_id}, Mark(start.state, behind)


def is_passing(error: BaseException) -> bool:
    """Whether an error, or what it came from, is that of a source that may answer again."""
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status in _BUSY or status >= 500
        if isinstance(cause, _NETWORK):
            return True
        if isinstance(cause, OSError) and errno.errorcode.get(cause.errno or 0) in _MOUNTS:
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False
