"""Conversations as tokens, and which of them are the assistant's answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Literal, Self

from transformers import PreTrainedTokenizerBase

from l2d_framework.errors import DataError
from l2d_framework.generation.chat_template import Messages, Spans, render
from l2d_framework.generation.prompts import EXCHANGE, read_template, shipped_templates, special_ids

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Turns = Literal["all", "first", "pairs", "accumulated", "sliding"]

# First and last exchange of each row, of a conversation of n exchanges.
_STRETCHES: dict[Turns, Callable[[int], Spans]] = {
    "first": lambda n: [(0, 0)],
    "pairs": lambda n: [(i, i) for i in range(n)],
    "accumulated": lambda n: [(0, i) for i in range(n)],
    "sliding": lambda n: [(i, j) for i in range(n) for j in range(i, n)],
}


def split_turns(messages: Messages, turns: Turns) -> list[Messages]:
    """Conversations to learn from one, each ending in the answer to learn, with the system messages that opened it."""
    ends = [i + 1 for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if turns not in _STRETCHES or not ends:
        return [messages]
    opening = sum(1 for _ in takewhile(lambda turn: turn["role"] == "system", messages))
    starts = [opening, *ends]
    return [[*messages[:opening], *messages[starts[a] : ends[b]]] for a, b in _STRETCHES[turns](len(ends))]


def resolve_template(chosen: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Source of a chat template: a name, a path, itself, or None for the tokenizer's own."""
    template = read_template(chosen)
    if template is not None:
        return template
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(
            "The data holds conversations, but this tokenizer has no chat template. Set data.chat_template to one that "
            f"is shipped ({shipped_templates()}), a jinja file or the template itself, or use the tokenizer of an "
            "instruction-tuned model."
        ) from error


@dataclass(frozen=True)
class ChatEncoder:
    """Turns conversations into tokens with one template; `special_ids` never occur inside a text."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    special_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: str) -> Self:
        """Encoder for a tokenizer and a template."""
        return cls(tokenizer, template, special_ids(tokenizer))

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Text of a conversation."""
        variables = self.tokenizer.special_tokens_map
        return render(self.template, messages, variables, add_generation_prompt=add_generation_prompt)[0]

    def encode(self, messages: Messages, *, last_only: bool = False) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation up to the end of its last answer, and which of them are answers; empty without one.

        The end of an answer's turn belongs to it. Answers are found by the template's generation markers, or else by
        rendering the turns before each answer. `last_only` counts no answer but the last one.
        """
        wanted = slice(-1 if last_only else None, None)
        if _GENERATION.search(self.template):
            text, spans = render(self.template, messages, self.tokenizer.special_tokens_map)
            spans = spans[wanted]
        else:
            answers = [i for i, turn in enumerate(messages) if turn.get("role") == "assistant"]
            text, spans = self._spans_by_prefix(messages, answers[wanted])
        if not spans:
            return [], []
        ids, spans = self._tokenize(text, spans)
        supervised = [False] * len(ids)
        for start, end in spans:
            end = self._turn_end(ids, start, end)
            supervised[start:end] = [True] * (end - start)
        # What follows the last answer teaches nothing, and a model that sees both ways would read it.
        ids, supervised = ids[:end], supervised[:end]
        return self._with_eos(ids), supervised + [True] * (ids[-1] not in self.special_ids)

    def last_token(self) -> int | None:
        """Id of the last token of an answer; None if the template refuses a question and an answer."""
        try:
            ids, _ = self.encode(EXCHANGE)
        except DataError:
            return None
        return ids[-1] if ids else None

    def encode_all(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Tokens of a whole conversation, every one of them supervised."""
        ids = self._ids([self.render(messages)])[0]
        ids = self._with_eos(ids[: self._turn_end(ids, 0, len(ids))])
        return ids, [True] * len(ids)

    def _spans_by_prefix(self, messages: Messages, answers: list[int]) -> tuple[str, Spans]:
        text = self.render(messages)
        spans = []
        for i in answers:
            prompt = self.render(messages[:i], add_generation_prompt=True)
            answered = self.render(messages[: i + 1])
            _require_prefix(prompt, answered, f"the first {i} messages with a generation prompt", f"the first {i + 1}")
            _require_prefix(answered, text, f"the first {i + 1} messages", "the whole conversation")
            spans.append((len(prompt), len(answered)))
        return text, spans

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _tokenize(self, text: str, spans: Spans) -> tuple[list[int], Spans]:
        # Tokens of `text`, and `spans` counted in tokens instead of characters.
        cuts = sorted({0, len(text), *(cut for span in spans for cut in span)})
        whole, *pieces = self._ids([text, *(text[a:b] for a, b in pairwise(cuts))])
        joined = [i for piece in pieces for i in piece]
        if joined == whole:
            counts = [0]
            for piece in pieces:
                counts.append(counts[-1] + len(piece))
        else:
            prefixes = self._ids([text[:cut] for cut in cuts])
            counts = [len(prefix) for prefix in prefixes]
            if any(whole[: len(prefix)] != prefix for prefix in prefixes):
                # A token straddles the border. In generation the prompt is tokenized on its own, so train on that too.
                if self.tokenizer.decode(joined) != self.tokenizer.decode(whole):
                    raise DataError(
                        "This tokenizer merges the end of the prompt with the beginning of the answer, and tokenizing "
                        "both apart changes the text. Use a chat template whose generation prompt ends with a special "
                        "token or a line break."
                    )
                whole, counts = joined, [sum(map(len, pieces[:n])) for n in range(len(cuts))]
        at = dict(zip(cuts, counts, strict=True))
        return whole, [(at[a], at[b]) for a, b in spans]

    def _turn_end(self, ids: list[int], start: int, end: int) -> int:
        # Just behind the special token that closes the turn: in the answer with only blanks after it, or next to it.
        last = end
        while last > start and ids[last - 1] not in self.special_ids:
            last -= 1
        if last > start and not str(self.tokenizer.decode(ids[last:end])).strip():
            return last
        return end + (end < len(ids) and ids[end] in self.special_ids)

    def _with_eos(self, ids: list[int]) -> list[int]:
        if ids and ids[-1] in self.special_ids:
            return ids
        return [*ids, require_eos(self.tokenizer)]


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "This tokenizer has no end-of-text token, so the model could never learn to stop. "
            "Set `eos_token` in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def _require_prefix(prefix: str, text: str, prefix_name: str, text_name: str) -> None:
    if text.startswith(prefix):
        return
    at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prefix, text, strict=False)))
    raise DataError(
        f"The chat template renders earlier turns differently when later ones follow: {prefix_name} are no beginning "
        f"of {text_name} (they part at character {at}: {prefix[at : at + 20]!r} against {text[at : at + 20]!r}), so "
        "answers cannot be told from prompts. Put {% generation %} ... {% endgeneration %} around the answers in a "
        "copy of the template and give it as data.chat_template."
    )
