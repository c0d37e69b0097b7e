"""One row of a data source as tokens, supervised positions and a class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from transformers import PreTrainedTokenizerBase

from l2d_framework.config import DataSection
from l2d_framework.errors import DataError, shown
from l2d_framework.generation import chat_template, prompts
from l2d_framework.generation.chat_template import Messages, check_conversation, check_text
from l2d_framework.training.data import chat

Format = Literal["messages", "prompt_completion", "text"]
Field = Literal["messages", "prompt", "completion", "text"]
Tokens = tuple[list[int], list[bool]]

FIELDS: dict[Format, tuple[Field, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""What a row of each format holds; `messages` with columns for prompt and completion makes them a chat of two turns."""

_FILES = (__file__, chat.__file__, prompts.__file__, str(chat_template.__file__))
_CODE = hashlib.sha256(b"".join(Path(name).read_bytes() for name in _FILES)).hexdigest()


class NothingSupervisedError(DataError):
    """An example holds no token to learn from; the only fault for which `drop_unsupervised` leaves one out."""


@dataclass(frozen=True)
class Columns:
    """Where a row keeps what."""

    format: Format
    names: dict[str, str]
    """Column of each field of that format."""
    class_column: str | None = None
    class_names: tuple[str, ...] | None = None
    """Names of the labels where that column stores numbers."""
    class_name: str | None = None
    """Class of every row."""


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens."""

    tokenizer: PreTrainedTokenizerBase
    front: tuple[int, ...]
    """Tokens that this tokenizer puts at the start of every sequence."""
    eos: int | None
    """Token that ends a text."""
    max_length: int | None
    everything: bool
    """Whether prompts are supervised, too."""
    turns: chat.Turns
    chat: chat.ChatEncoder | None
    classes: tuple[str, ...]
    """A class is stored as its position here."""
    class_map: tuple[tuple[str, str], ...]
    code: str = _CODE
    """So that no cache outlives the code that encodes."""
    known: Mapping[str, list[int]] = field(default_factory=dict)
    """Texts whose tokens are known already."""

    @classmethod
    def of(
        cls, section: DataSection, tokenizer: PreTrainedTokenizerBase, *, classes: list[str], has_chat: bool
    ) -> Self:
        """Encoding that a run file asks for."""
        strangers = sorted(set(section.class_map.values()) - set(classes))
        if strangers:
            raise DataError(f"data.class_map leads to {strangers}, but the classes of this run are {classes}.")
        encoder = None
        if has_chat:
            encoder = chat.ChatEncoder.of(tokenizer, chat.resolve_template(section.chat_template, tokenizer))
        return cls(
            tokenizer,
            front=tuple(prompts.opening(tokenizer)),
            eos=tokenizer.eos_token_id,
            # Documents are cut into chunks only once they are packed.
            max_length=None if section.pack else section.max_length,
            everything=section.supervise == "all",
            turns=section.turns,
            chat=encoder,
            classes=tuple(classes),
            class_map=tuple(section.class_map.items()),
        )

    def reading(self, batch: Mapping[str, Sequence[Any]], columns: Columns) -> Encoding:
        """The same, with the tokens of the plain texts in a batch: one call of the tokenizer instead of two a row."""
        texts = []
        for name in columns.names.values() if columns.format != "messages" else ():
            for place in range(len(batch[name])):
                with suppress(DataError):  # said where the row is read
                    texts.append(_text({name: batch[name][place]}, name))
        return replace(self, known=dict(zip(texts, prompts.tokens_of(self.tokenizer, texts), strict=True)))

    def tokens(self, text: str) -> list[int]:
        """Ids of a text by itself."""
        return self.known[text] if text in self.known else prompts.tokens_of(self.tokenizer, [text])[0]

    def ends(self, formats: Iterable[Format]) -> tuple[int, ...]:
        """Tokens that answers end with: the ends of turns for conversations, the end-of-text token for texts."""
        ends: list[int | None] = []
        for each in formats:
            if each == "messages" and self.chat is not None:
                ends += [prompts.turn_end(self.tokenizer, self.chat.template), self.chat.last_token()]
            else:
                ends.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(token for token in ends if token is not None))


def split_example(row: Mapping[str, Any], columns: Columns, encoding: Encoding) -> list[Mapping[str, Any]]:
    """Rows to learn from one row: several where `data.turns` makes several conversations of one."""
    if "messages" not in columns.names:
        return [row]
    conversations = chat.split_turns(_messages(row, columns), encoding.turns)
    return [{**row, columns.names["messages"]: list(conversation)} for conversation in conversations]


def encode_example(row: Mapping[str, Any], columns: Columns, encoding: Encoding) -> dict[str, Any]:
    """`input_ids` of a row, which of them are `supervised`, and its `class_id`, -1 for none."""
    ids, supervised = _READERS[columns.format](row, columns, encoding)
    # The first token is never supervised, since nothing before it could predict it.
    kept = [False, *supervised[1 : encoding.max_length]]
    if not any(kept):
        raise NothingSupervisedError(
            f"all {sum(supervised)} supervised tokens of {len(ids)} lie beyond max_length = {encoding.max_length}. "
            "Raise data.max_length, or skip such examples with data.drop_unsupervised: true."
            if any(supervised[1:])
            else "it has no token to learn from (an empty text, or a conversation without an answer). Remove it, or "
            "skip such examples with data.drop_unsupervised: true."
        )
    return {
        "input_ids": ids[: encoding.max_length],
        "supervised": kept,
        "class_id": _class_id(row, columns, encoding),
    }


def _read_messages(row: Mapping[str, Any], columns: Columns, encoding: Encoding) -> Tokens:
    messages = _messages(row, columns)
    if encoding.chat is None:
        raise DataError("the row is a conversation, but no chat template was prepared.")
    if encoding.everything:
        return encoding.chat.encode_all(messages)
    ids, supervised = encoding.chat.encode(messages, last_only=encoding.turns != "all")
    if supervised and all(supervised[1:]):
        raise DataError(
            "every token of this conversation is supervised, so the prompt was not recognised. Check where the chat "
            "template puts {% generation %} and that a prompt precedes the answer, or ask for it with "
            "data.supervise: all."
        )
    return ids, supervised


def _messages(row: Mapping[str, Any], columns: Columns) -> Messages:
    if "messages" not in columns.names:
        turns = {"user": columns.names["prompt"], "assistant": columns.names["completion"]}
        return [{"role": role, "content": _text(row, column)} for role, column in turns.items()]
    column = columns.names["messages"]
    try:
        return check_conversation(row[column])
    except DataError as error:
        raise DataError(f"column {column!r}: {error}") from error


def _read_prompt_completion(row: Mapping[str, Any], columns: Columns, encoding: Encoding) -> Tokens:
    prompt, completion = (_text(row, columns.names[field]) for field in ("prompt", "completion"))
    asked = prompts.opened(encoding.front, encoding.tokens(prompt))
    if not completion.strip():
        return asked, [False] * len(asked)
    answer = _ended(encoding.tokens(completion), encoding)
    return asked + answer, [encoding.everything] * len(asked) + [True] * len(answer)


def _read_text(row: Mapping[str, Any], columns: Columns, encoding: Encoding) -> Tokens:
    text = _text(row, columns.names["text"])
    ids = _ended(prompts.opened(encoding.front, encoding.tokens(text)), encoding)
    return ids, [bool(text.strip())] * len(ids)


_READERS: dict[Format, Callable[[Mapping[str, Any], Columns, Encoding], Tokens]] = {
    "messages": _read_messages,
    "prompt_completion": _read_prompt_completion,
    "text": _read_text,
}


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {shown(value)}, not a text.")
    # Readers of plain text, packed or on the Hub, take the byte-order mark of a file for a part of its first line.
    return check_text(value.removeprefix("\ufeff"))


def _ended(ids: list[int], encoding: Encoding) -> list[int]:
    # What a tokenizer takes for this question adds up over the rows.
    eos = chat.require_eos(encoding.tokenizer) if encoding.eos is None else encoding.eos
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _class_id(row: Mapping[str, Any], columns: Columns, encoding: Encoding) -> int:
    label = columns.class_name if columns.class_column is None else row[columns.class_column]
    if label is None:
        return -1
    if columns.class_names is not None and isinstance(label, int):
        label = columns.class_names[label]
    name = dict(encoding.class_map).get(str(label), str(label))
    if name not in encoding.classes:
        raise DataError(
            f"the class label {label!r} of column {columns.class_column!r} is not known. Classes of this run: "
            f"{list(encoding.classes)}; labels in data.class_map: {[key for key, _ in encoding.class_map]}. "
            "Add the label to data.class_map, or the class to the run."
        )
    return encoding.classes.index(name)
