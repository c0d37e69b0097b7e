"""The first examples of a run's data as training will see them, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from l2d_framework.config import DataSection
from l2d_framework.errors import DataError
from l2d_framework.training.data.encode import Encoding, NothingSupervisedError, encode_example, split_example
from l2d_framework.training.data.sources import Opened, describe, load_sources

EXAMPLES = 100
"""How many are looked at."""


@dataclass(frozen=True)
class Sample:
    """What the first examples show.

    Attributes:
        rows: `input_ids`, `supervised` and `class_id` of each, cut to the run's length.
        lengths: tokens of each before it was cut.
        left_out: further ones in which nothing to learn lies within the run's length.
        total: examples in all, about; None of a stream.
    """

    rows: list[dict[str, Any]]
    lengths: list[int]
    left_out: int
    total: int | None


def sample(section: DataSection, tokenizer: PreTrainedTokenizerBase, *, classes: Sequence[str] = ()) -> Sample:
    """Encode the first examples of the training data, as many of each source.

    Args:
        section: what to learn from.
        tokenizer: of the language model.
        classes: names of the labels.

    Returns:
        What they show.

    Raises:
        DataError: if none of them has a token to learn.
    """
    opened = load_sources(section, "train")
    has_chat = any(one.columns.format == "messages" for one in opened)
    encoding = replace(
        Encoding.of(section, tokenizer, classes=list(classes), has_chat=has_chat), max_length=None
    )  # whole, to see what is cut off
    rows: list[dict[str, Any]] = []
    lengths: list[int] = []
    totals: list[float] = []
    left_out = 0
    for one in opened:
        read, first = 0, len(rows)
        for row in _rows(one, -(-EXAMPLES // len(opened))):
            read += 1
            for example in _encoded(row, one, encoding):
                supervised = [] if example is None else example["supervised"][: section.max_length]
                if example is None or not any(supervised):
                    left_out += 1
                    continue
                lengths.append(len(example["input_ids"]))
                rows.append(
                    example | {"input_ids": example["input_ids"][: section.max_length], "supervised": supervised}
                )
        share = (len(rows) - first) / max(read, 1)
        if section.pack:
            share *= sum(lengths[first:]) / max(len(rows) - first, 1) / section.max_length
        totals.append(share * (1 if section.streaming else len(one.data)))
    if not rows:
        raise DataError(
            f"None of the first examples of {describe(opened[0].source)} has a token to learn within data.max_length "
            f"{section.max_length}. Raise it, or name other data."
        )
    weights = [one.source.weight for one in opened]
    return Sample(rows, lengths, left_out, None if section.streaming else _total(totals, weights, section))


def count_rows(section: DataSection) -> int | None:
    """Rows of the training data, about as many as examples; None of a stream."""
    opened = load_sources(section, "train")
    if section.streaming:
        return None
    return _total([float(len(one.data)) for one in opened], [one.source.weight for one in opened], section)


def _rows(opened: Opened, count: int) -> Iterator[Any]:
    if hasattr(opened.data, "__len__"):
        yield from (opened.data[i] for i in range(min(count, len(opened.data))))
    else:
        yield from islice(opened.data, count)


def _encoded(row: Any, opened: Opened, encoding: Encoding) -> Iterator[dict[str, Any] | None]:
    for example in split_example(row, opened.columns, encoding):
        try:
            yield encode_example(example, opened.columns, encoding)
        except NothingSupervisedError:
            yield None


def _total(counts: list[float], weights: list[float], section: DataSection) -> int:
    # Sources of unequal weights are drawn from until each has been read.
    shares = [weight / sum(weights) for weight in weights]
    is_drawn = len(set(weights)) > 1
    total = max(count / share for count, share in zip(counts, shares, strict=True)) if is_drawn else sum(counts)
    return max(round(total * (1 - (0.0 if section.eval else section.eval_fraction))), 1)
