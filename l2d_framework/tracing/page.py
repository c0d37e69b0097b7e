"""A trace as one web page that needs nothing but itself, and tokens as its reader sees them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from l2d_framework.tracing.record import Trace
from l2d_framework.writing import write_whole

_MARK = "@@DATA@@"


def write_page(trace: Trace, tokenizer: PreTrainedTokenizerBase, path: Path, *, title: str = "") -> None:
    """Write a page that plays the trace back: the draft at every evaluation, coloured by confidence."""
    texts = token_texts(tokenizer, {*trace.tokens, *trace.ids.flatten().tolist()})
    data = {"title": title, "texts": {str(token): text for token, text in texts.items()}, "trace": trace.to_json()}
    # In ASCII without any character that means something to an HTML parser.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    write_whole(path, template.replace(_MARK, text))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str]:
    """Text that each token adds to a text before it.

    A byte that is no character by itself appears as the tokenizer's own symbol, an id it does not know as its number.
    """

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # A tokenizer drops the space before the first word of a text, so that no token may be the first.
    anchor = tokenizer.encode("a", add_special_tokens=False)
    start, known = decode(anchor), len(tokenizer)

    def text_of(token: int) -> str:
        text = decode([*anchor, token])
        text = text[len(start) :] if text.startswith(start) else decode([token])
        if text and "\ufffd" not in text:
            return text
        symbol = tokenizer.convert_ids_to_tokens(token)
        return symbol if isinstance(symbol, str) and symbol else f"⟨{token}⟩"

    return {token: text_of(token) if token < known else f"⟨{token}⟩" for token in set(ids)}
