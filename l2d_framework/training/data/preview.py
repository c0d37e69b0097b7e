"""A first look at a data source that nothing is known of: its format, its columns and how long its examples are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from l2d_framework.config import DataSection, DataSource
from l2d_framework.errors import DataError
from l2d_framework.training.data.encode import FIELDS, Encoding, NothingSupervisedError, encode_example, split_example
from l2d_framework.training.data.sources import Opened, describe, load_rows, open_first

ROWS = 200
"""Rows that are looked at."""
_TEMPLATE = "tulu"
"""Shipped template that stands in where a tokenizer has none."""
_LONGEST = 1_000_000
_OTHER_NAMES = {
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat"),
    "prompt": ("question", "instruction", "query", "input", "source", "problem"),
    "completion": ("answer", "response", "output", "target", "solution", "chosen"),
    "text": ("content", "document", "body", "sentence"),
}
"""What data sets call our columns."""


@dataclass(frozen=True)
class Preview:
    """What the first rows of a source show.

    Attributes:
        source: the source with the columns that were found.
        format: conversations, prompts with completions or texts.
        chat_template: template that a run file must name, as the tokenizer has none; None where it has, or needs none.
        lengths: tokens of each example, sorted.
        is_whole: whether there are no further rows.
    """

    source: DataSource
    format: str
    chat_template: str | None
    lengths: list[int]
    is_whole: bool


def preview(path: str, tokenizer: PreTrainedTokenizerBase) -> Preview:
    """Look at the first rows of a file, folder or hub id.

    Args:
        path: where they are.
        tokenizer: that of the base model.

    Returns:
        What they show.

    Raises:
        DataError: if they cannot be read or hold nothing to learn.
    """
    opened = _open(path)
    template = None
    if opened.columns.format == "messages" and not tokenizer.chat_template:
        template = _TEMPLATE
    section = DataSection(train=[opened.source], max_length=_LONGEST, chat_template=template)
    encoding = Encoding.of(section, tokenizer, classes=[], has_chat=opened.columns.format == "messages")
    rows = iter(opened.data)
    lengths = []
    for row in islice(rows, ROWS):
        for example in split_example(row, opened.columns, encoding):
            try:
                lengths.append(len(encode_example(example, opened.columns, encoding)["input_ids"]))
            except NothingSupervisedError:
                continue
    if not lengths:
        raise DataError(f"{describe(opened.source)} holds nothing to learn in its first {ROWS} rows. Name other data.")
    return Preview(opened.source, opened.columns.format, template, sorted(lengths), next(rows, None) is None)


def _open(path: str) -> Opened:
    source = DataSource(path=path)
    try:
        opened = open_first(source)
    except DataError as error:
        columns = _guessed(source)
        if columns is None:
            raise
        try:
            opened = open_first(source.model_copy(update={"columns": columns}))
        except DataError:
            raise error from None
    if opened is None:
        raise DataError(f"{describe(source)} cannot be reached now, so nothing can be found out of it. Name a file.")
    return opened


def _guessed(source: DataSource) -> dict[str, str] | None:
    """The columns by which one of our formats can be had; None if there are none, or nothing can be read."""
    try:
        present = {name.lower(): name for name in load_rows(source, streaming=True)[1]}
    except DataError:
        return None
    for fields in FIELDS.values():
        found = {
            field: next((present[name] for name in (field, *_OTHER_NAMES[field]) if name in present), None)
            for field in fields
        }
        if all(found.values()):
            return {field: name for field, name in found.items() if name and name != field}
    return None
