"""Training and evaluation data of a run: sources opened, encoded, mixed, numbered and counted."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from l2d_framework.config import DataSection
from l2d_framework.errors import DataError
from l2d_framework.training.data.encode import (
    Columns,
    Encoding,
    NothingSupervisedError,
    encode_example,
    split_example,
)
from l2d_framework.training.data.sources import Opened, describe, load_sources, open_first
from l2d_framework.training.data.stream import BATCH, ENCODED, START, Stream, packed, unbatched

_FIRST_ROWS = 200
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and evaluates on.

    Rows hold `input_ids`, `supervised`, `class_id` and `index`, the row's number in data order: unique, and the same
    whatever the shuffling, the sharding or the point of resumption.
    """

    train: Any
    """A `Dataset`, or when streaming a `Stream`; so is `eval`."""
    eval: Any | None
    card: dict[str, Any]
    order_seed: int
    ends: tuple[int, ...]
    """Tokens that answers end with."""


def prepare(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, *, classes: Sequence[str] = (), seed: int = 0
) -> PreparedData:
    """Open, encode, mix and number the data of a run; `seed` decides the held-out rows."""
    opened = {which: load_sources(section, which) for which in ("train", "eval")}
    everything = [*opened["train"], *opened["eval"]]
    _check(section, everything, classes)
    has_chat = any(one.columns.format == "messages" for one in everything)
    encoding = Encoding.of(section, tokenizer, classes=list(classes), has_chat=has_chat)
    train = [_encode(one, section, encoding) for one in opened["train"]]
    held_out = [_encode(one, section, encoding) for one in opened["eval"]]
    if section.eval_fraction and not held_out:
        part = partial(_is_in_part, seed=seed, fraction=section.eval_fraction)
        held_out, train = (
            [data.filter(partial(part, held_out=which), input_columns=["input_ids"]) for data in train]
            for which in (True, False)
        )
    order_seed = seed if section.shuffle_seed is None else section.shuffle_seed
    weights = [one.source.weight for one in opened["train"]]
    mixed = {"train": _mix(train, weights, order_seed)}
    if held_out:
        mixed["eval"] = _mix(held_out, [1.0] * len(held_out), order_seed)
    splits: dict[str, Any] = {}
    for which, data in mixed.items():
        if section.streaming:
            # Streams come in the order of their files, which sorts many data sets by topic.
            buffer, shards = (section.shuffle_buffer, section.shards) if which == "train" else (1, 1)
            name, length = _names(opened[which], data, shards), section.max_length if section.pack else None
            found: dict[str, Any] = {
                "parts": [one.data.num_shards for one in opened[which]],
                "has_row_groups": any(
                    one.card["local"] and one.data.builder_name == "parquet" for one in opened[which]
                ),
            }
            splits[which] = Stream(data, name, length, buffer=buffer, seed=order_seed, shards=shards, **found)
            continue
        splits[which] = _finish(data, section)
        if not len(splits[which]):
            raise DataError(f"No row is left for {which}: check data.eval_fraction, data.drop_unsupervised and limits.")
    card = {
        "sources": {which: [one.card for one in ones] for which, ones in opened.items()},
        "splits": {which: _count(data, is_masked=section.masking is not None) for which, data in splits.items()},
        "held_out": {"fraction": section.eval_fraction, "seed": seed} if section.eval_fraction else None,
        "max_length": section.max_length,
        "streaming": section.streaming,
        "packed": section.pack,
        "turns": section.turns,
    }
    ends = encoding.ends(one.columns.format for one in opened["train"])
    return PreparedData(splits["train"], splits.get("eval"), card, order_seed, ends)


def check_first_rows(
    section: DataSection, tokenizer: PreTrainedTokenizerBase | None, *, classes: Sequence[str] = ()
) -> list[str]:
    """Encode the first 200 rows of each source, as training will; says what a user should know of them."""
    notes, opened = [], []
    for source in (*section.train, *section.eval):
        if one := open_first(source):
            opened.append(one)
        else:
            notes.append(f"{describe(source)} cannot be reached now; its rows are not checked.")
    _check(section, opened, classes)
    if tokenizer is None:
        return notes
    has_chat = any(one.columns.format == "messages" for one in opened)
    encoding = Encoding.of(section, tokenizer, classes=list(classes), has_chat=has_chat)
    for one in opened:
        following = iter(one.data)
        rows = list(islice(following, _FIRST_ROWS))
        encoder = _Encoder.of(one, section, encoding)
        encoded = encoder({name: [row.get(name) for row in rows] for name in rows[0]}, list(range(len(rows))))
        empty = [i for ids, i in zip(encoded["input_ids"], encoded["class_id"], strict=True) if not ids]
        if empty:
            try:
                count = encoder.tolerate(len(empty), len(encoded["input_ids"]), empty[0], rows[empty[0]])
                notes.append(f"{count} among the first {len(rows)} rows.")
            except NothingSupervisedError as error:
                # A stream stops there, too; of other sources the share of all rows counts.
                if section.streaming or next(following, None) is None:
                    raise
                notes.append(f"{error} Training stops if the rows after the first {len(rows)} do not make up for it.")
    return notes


def _check(section: DataSection, opened: list[Opened], classes: Sequence[str]) -> None:
    if section.streaming and section.eval_fraction and not section.eval:
        raise DataError(
            f"data.eval_fraction = {section.eval_fraction} would read the whole stream for every evaluation. "
            "Name a source under data.eval, or set data.streaming: false."
        )
    for one in opened:
        if one.columns.class_column is not None and not classes:
            raise DataError(
                f"{describe(one.source)} has the class column {one.columns.class_column!r}, but the run has no "
                "classes. List them, or remove class_column."
            )
        if section.pack and (one.columns.format != "text" or one.columns.class_column is not None):
            raise DataError(
                f"data.pack joins documents of plain text without classes, but {describe(one.source)} has the format "
                f"{one.columns.format!r} and class_column {one.columns.class_column!r}. Set data.pack: false."
            )
        if section.masking is not None and one.columns.format != "text":
            raise DataError(
                f"data.masking chooses what to generate of plain text, but {describe(one.source)} has the format "
                f"{one.columns.format!r}, whose answers are generated. Remove data.masking, or name a text column."
            )


@dataclass(frozen=True)
class _Encoder:
    """Encodes batches of rows; a class, so that `datasets` caches by its fields.

    An example without a supervised token gives a row without tokens, whose class is the example's number; a stream
    leaves it out at once.
    """

    columns: Columns
    encoding: Encoding
    where: str
    share: float
    streams: bool
    tally: Counter[str] = field(default_factory=Counter)
    """Rows of a stream so far, in this process, that were `seen` and `dropped`."""

    @classmethod
    def of(cls, opened: Opened, section: DataSection, encoding: Encoding, *, streams: bool = False) -> _Encoder:
        return cls(opened.columns, encoding, describe(opened.source), float(section.drop_unsupervised), streams)

    def __call__(self, batch: Any, indices: list[int]) -> dict[str, list[Any]]:
        encoded: dict[str, list[Any]] = {name: [] for name in ENCODED}
        names = list(batch)
        encoding = self.encoding.reading(batch, self.columns)
        for index, values in zip(indices, zip(*(batch[name] for name in names), strict=True), strict=True):
            example = dict(zip(names, values, strict=True))
            try:
                for row in self._rows(example, index, encoding):
                    if self.streams and self._passes_over(row, example):
                        continue
                    for name, value in row.items():
                        encoded[name].append(value)
            except NothingSupervisedError:
                raise
            except DataError as error:
                raise type(error)(f"Example {index} of {self.where}: {error}") from error
        return encoded

    def _rows(self, example: dict[str, Any], index: int, encoding: Encoding) -> Iterator[dict[str, Any]]:
        for row in split_example(example, self.columns, encoding):
            try:
                yield encode_example(row, self.columns, encoding)
            except NothingSupervisedError:
                yield {"input_ids": [], "supervised": [], "class_id": index}

    def _passes_over(self, row: dict[str, Any], example: dict[str, Any]) -> bool:
        self.tally["seen"] += 1
        if row["input_ids"]:
            return False
        self.tally["dropped"] += 1
        dropped = self.tally["dropped"]
        text = self.tolerate(dropped, self.tally["seen"], row["class_id"], example)
        if str(dropped).strip("0") == "1":
            _LOGGER.warning("%s so far.", text)
        return True

    def tolerate(self, dropped: int, seen: int, first: int, example: dict[str, Any]) -> str:
        """Refuse more examples without a supervised token than there may be; else begin a sentence that counts them."""
        # A share of the first few rows of a stream says nothing.
        if dropped > self.share * (max(seen, _FIRST_ROWS) if self.streams else seen):
            try:
                for row in split_example(example, self.columns, self.encoding):
                    encode_example(row, self.columns, self.encoding)
            except NothingSupervisedError as error:
                raise NothingSupervisedError(
                    f"Example {first} of {self.where}: {error} It is one of {dropped} in {seen}, and "
                    f"data.drop_unsupervised allows a share of {self.share:g}."
                ) from error
        return (
            f"{self.where}: left out {dropped} of {seen} examples, in which nothing to learn lies within "
            f"data.max_length {self.encoding.max_length},"
        )


def _encode(opened: Opened, section: DataSection, encoding: Encoding) -> Any:
    encoder = _Encoder.of(opened, section, encoding, streams=section.streaming)
    options: dict[str, Any] = {"batched": True, "with_indices": True, "features": ENCODED}
    # `features` of a stream may be unknown, so its columns are named by a row.
    options["remove_columns"] = list(next(iter(opened.data)))
    if section.streaming:
        data = opened.data.map(encoder, batch_size=BATCH, **options)
        left = next(iter(data), None) is not None
        opened.card["dropped"] = None
    else:
        data = opened.data.map(encoder, desc=f"Encoding {opened.source.path}", **options)
        empty = _is_empty(data)
        left, dropped = not empty.all(), int(empty.sum())
        opened.card["dropped"] = dropped
        if dropped and left:
            first = data[int(empty.argmax())]["class_id"]
            text = encoder.tolerate(dropped, len(data), first, opened.data[first])
            _LOGGER.warning("%s in all.", text)
            data = data.select(np.flatnonzero(~empty))
    if not left:
        raise DataError(
            f"No example of {encoder.where} has a supervised token within data.max_length. Raise it, or fill the texts "
            "and answers that are empty."
        )
    return data


def _is_empty(data: Any) -> Any:
    # Of each row, whether it has no token.
    tables = data.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000)
    lengths = [table["input_ids"].combine_chunks().value_lengths().to_numpy() for table in tables]
    return np.concatenate(lengths) == 0 if lengths else np.ones(0, np.bool_)


def is_held_out(content: bytes, seed: int, fraction: float) -> bool:
    """Whether to hold data out: decided by content, so that equal data are on one side and new ones move no others."""
    digest = hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _is_in_part(ids: Sequence[int], seed: int, fraction: float, held_out: bool) -> bool:
    return is_held_out(np.asarray(ids, np.int64).tobytes(), seed, fraction) == held_out


def _mix(parts: list[Any], weights: list[float], seed: int) -> Any:
    if len(parts) == 1:
        return parts[0]
    if len(set(weights)) == 1:
        if all(isinstance(part, datasets.Dataset) for part in parts):
            return datasets.concatenate_datasets(parts)
        return datasets.interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
    # Until every source is exhausted, which repeats rows of the others.
    chances = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(parts, probabilities=chances, seed=seed, stopping_strategy="all_exhausted")


def _finish(data: Any, section: DataSection) -> Any:
    if section.pack and len(data):
        options = {"rows": data, "length": section.max_length}
        known = {"fingerprint": Hasher.hash([data._fingerprint, packed, section.max_length]), "features": ENCODED}
        data = datasets.Dataset.from_generator(_packed, gen_kwargs=options, **known)
    return data.add_column("index", np.arange(len(data)))


def _names(opened: list[Opened], data: Any, shards: int) -> str:
    """Names of a stream's sources; refused if these cannot be divided so."""
    names = " or ".join(describe(one.source) for one in opened)
    if shards > data.num_shards:
        raise DataError(
            f"data.shards is {shards}, but {names} can be read in {data.num_shards} parts only: files, stretches of "
            "large ones that hold JSON lines, and row groups of parquet. Lower it, or divide the data into more files."
        )
    return names


def _packed(rows: Any, length: int) -> Iterator[dict[str, Any]]:
    examples = (one for batch in rows.iter(batch_size=BATCH) for one in unbatched(batch, START))
    yield from (row for row, *_ in packed(examples, length))


def _count(data: Any, *, is_masked: bool) -> dict[str, int | None]:
    if not isinstance(data, datasets.Dataset):
        return {"examples": None, "tokens": None, "supervised_tokens": None}
    tokens = supervised = 0
    for table in data.with_format("arrow").iter(batch_size=1000):
        flags = table["supervised"].combine_chunks().flatten()
        tokens += len(flags)
        supervised += flags.true_count
    # Masks are drawn while training, anew in every epoch.
    return {"examples": len(data), "tokens": tokens, "supervised_tokens": None if is_masked else supervised}
