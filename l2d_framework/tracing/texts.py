"""Tokens as a reader sees them, one at a time."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str]:
    """Text that each token adds to a text before it.

    A byte that is no character by itself appears as the tokenizer's own symbol, an id it does not know as its number.

    Args:
        tokenizer: the model's.
        ids: tokens, each as often as one likes.

    Returns:
        Text by id.
    """
    # A tokenizer drops the space before the first word of a text, so that no token may be the first.
    anchor = tokenizer.encode("a", add_special_tokens=False)
    start = _decode(tokenizer, anchor)
    known = len(tokenizer)
    return {token: _text(tokenizer, anchor, start, token) if token < known else f"⟨{token}⟩" for token in set(ids)}


def _text(tokenizer: PreTrainedTokenizerBase, anchor: list[int], start: str, token: int) -> str:
    text = _decode(tokenizer, [*anchor, token])
    text = text[len(start) :] if text.startswith(start) else _decode(tokenizer, [token])
    if text and "\ufffd" not in text:
        return text
    symbol = tokenizer.convert_ids_to_tokens(token)
    return symbol if isinstance(symbol, str) and symbol else f"⟨{token}⟩"


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
