"""Prompts: from texts and conversations to a batch of token ids."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from l2d_framework.errors import ConfigError, DataError
from l2d_framework.generation.chat_template import check_conversation, check_text, render
from l2d_framework.opening import new_model

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
"""Plain text, or a conversation as a list of {"role", "content"}."""

_SHIPPED = Path(__file__).parent / "chat_templates"

_TOGETHER = 32
"""Texts in one call of a tokenizer."""

EXCHANGE: tuple[Message, ...] = ({"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "Indeed"})
"""A conversation by which a chat template shows how it ends an answer."""


@dataclass(frozen=True)
class Encoded:
    """Prompts as token ids.

    Attributes:
        input_ids: padded on the left, (B, S), int64.
        attention_mask: 1 where a real token stands, (B, S), int64.
        keys: names for the noise, of each prompt, whose answers are then numbered, or of each answer; made from the
            tokens when None.
        chats: which prompts are conversations, whose answers end with their turn; none when None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    keys: Sequence[str] | None = None
    chats: Sequence[bool] | None = None

    def to(self, device: torch.device) -> Encoded:
        """The same with its tokens on a device."""
        ids, mask = (part.to(device, torch.int64) for part in (self.input_ids, self.attention_mask))
        return replace(self, input_ids=ids, attention_mask=mask)


def read_template(chosen: str | None) -> str | None:
    """Source of a chat template: of a name in `chat_templates`, a path, or itself; None stays None."""
    if chosen is None or "{" in chosen or "\n" in chosen:
        return chosen
    shipped = {path.stem: path for path in _SHIPPED.glob("*.jinja")}
    path = shipped.get(chosen, Path(chosen).expanduser())
    if not path.is_file():
        raise DataError(
            f"data.chat_template names the file {chosen!r}, which does not exist (looked in {Path.cwd()}). "
            f"Give the path of a jinja file, the template itself, or a name: {shipped_templates()}."
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template: {chosen!r} cannot be read ({error}). Give a file in UTF-8.") from error


def shipped_templates() -> str:
    """Names of the chat templates that come with this package."""
    return ", ".join(sorted(path.stem for path in _SHIPPED.glob("*.jinja")))


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that a tokenizer puts in front of every text; what it puts behind one would end a prompt."""
    if not tokenizer("")["input_ids"]:
        return []
    whole, bare = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    return whole[: next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, front: Sequence[int] | None = None) -> list[int]:
    """Ids of a text that something follows, not doubling what stands in front anyway (`front`: what `opening` gave)."""
    return opened(opening(tokenizer) if front is None else front, tokens_of(tokenizer, [text])[0])


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts by themselves."""
    # A call for each would take ten times as long, one for all of many long texts much memory.
    parts = (list(texts[start : start + _TOGETHER]) for start in range(0, len(texts), _TOGETHER))
    return [list(ids) for part in parts for ids in tokenizer(part, add_special_tokens=False)["input_ids"]]


def opened(front: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Ids behind those of `front`, of which they may have the last already."""
    front, ids = list(front), list(ids)
    missing = next(n for n in range(len(front) + 1) if front[n:] == ids[: len(front) - n])
    return [*front[:missing], *ids]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that never occur inside a text, among them the ends of turns."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def turn_end(tokenizer: PreTrainedTokenizerBase | None, template: str | None = None) -> int | None:
    """Token with which a chat template (the tokenizer's own when None) ends an answer.

    It is the first special token that follows the answer, with only blanks between; the end-of-text token where the
    template writes none, or refuses or rewrites a question and an answer; None where there is no template.
    """
    if tokenizer is None or (template is None and tokenizer.chat_template is None):
        return None
    last: int | None = tokenizer.eos_token_id
    try:
        text, _ = render(template or str(tokenizer.get_chat_template()), EXCHANGE, tokenizer.special_tokens_map)
    except DataError:
        return last
    special = special_ids(tokenizer)
    _, answer, behind = text.rpartition(EXCHANGE[-1]["content"])
    for token in tokenizer(behind, add_special_tokens=False)["input_ids"] if answer else ():
        if token in special:
            return int(token)
        if str(tokenizer.decode([token])).strip():
            break
    return last


def add_ends(config: GenerationConfig, ends: Iterable[int]) -> None:
    """Let further tokens end an answer: changes the configuration, unless it names all of them."""
    known = config.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    if missing := [token for token in dict.fromkeys(ends) if token not in known]:
        config.eos_token_id = [*known, *missing]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    chat_template: str | None = None,
    *,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of prompts, without padding; conversations end with the generation prompt. `names`: for messages."""
    if tokenizer is None:
        raise ConfigError("This model has no tokenizer, so it takes token ids only. Save one in the base folder.")
    if not prompts:
        raise ConfigError("There is no prompt. Give at least one.")
    texts = []
    for number, prompt in enumerate(prompts):
        where = f"Prompt {number}" if names is None else names[number]
        if not isinstance(prompt, str) and chat_template is None and tokenizer.chat_template is None:
            raise ConfigError(
                f"{where} is a conversation, but the tokenizer of {tokenizer.name_or_path!r} has no chat "
                "template. Give plain text, or set data.chat_template when training."
            )
        try:
            if isinstance(prompt, str):
                texts.append(check_text(prompt))
            else:
                template = chat_template or str(tokenizer.get_chat_template())
                messages = check_conversation(prompt)
                text, _ = render(template, messages, tokenizer.special_tokens_map, add_generation_prompt=True)
                texts.append(text)
        except DataError as error:
            raise ConfigError(f"{where}: {error}") from error
    front, batch = opening(tokenizer), []
    for number, (prompt, ids) in enumerate(zip(prompts, tokens_of(tokenizer, texts), strict=True)):
        batch.append(opened(front, ids) if isinstance(prompt, str) else list(ids))
        if not batch[-1]:
            where = f"Prompt {number}" if names is None else names[number]
            raise ConfigError(f"{where} is empty. Give at least one token, such as the tokenizer's BOS.")
    return batch


def pad_left(
    batch: Sequence[Sequence[int]], keys: Sequence[str] | None = None, *, chats: Sequence[bool] | None = None
) -> Encoded:
    """Token ids as one batch."""
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch):
        ids[row, width - len(tokens) :] = torch.tensor(list(tokens))
        mask[row, width - len(tokens) :] = 1
    return Encoded(ids, mask, keys, chats=chats)


def context_length(lm_config: Any) -> int | None:
    """Longest text that a language model has positions for, in tokens; None where there is no limit."""
    limit = getattr(lm_config, "max_position_embeddings", None)
    if limit is None or lm_config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return limit
    shallow = copy.copy(lm_config)
    shallow.num_hidden_layers = 1
    with torch.device("meta"):
        embeddings = getattr(new_model(AutoModel, shallow), "embeddings", None)
    # The RoBERTa family keeps the places up to that of its padding token.
    return int(limit) - 1 - int(getattr(embeddings, "padding_idx", -1))


def check_length(
    lengths: Sequence[int], config: GenerationConfig, lm_config: Any, *, names: Sequence[str] | None = None
) -> None:
    """Refuse prompts whose answers would exceed the model's context."""
    context = context_length(lm_config)
    if context is None:
        return
    for number, length in enumerate(lengths):
        wanted = length + config.max_new_tokens if config.max_new_tokens is not None else config.max_length or 0
        wanted = max(wanted, length + 1)
        if wanted > context:
            where = f"Prompt {number}" if names is None else names[number]
            raise ConfigError(
                f"{where} has {length} tokens and with its answer would reach {wanted}, but the model's "
                f"context is {context}. Shorten the prompt or lower max_new_tokens."
            )
