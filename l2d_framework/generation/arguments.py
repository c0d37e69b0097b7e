"""Arguments of a request, each checked by name before anything runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
)
from torch import Tensor
from transformers import GenerationConfig

from l2d_framework.drafter import Drafter
from l2d_framework.errors import ConfigError, shown, suggest
from l2d_framework.generation.prompts import Encoded
from l2d_framework.types import Layout


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's own, and their arrays and tuples as lists."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {tuple(map(_plain, key)) if isinstance(key, tuple) else key: _plain(item) for key, item in value.items()}
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _known(token: int, info: ValidationInfo) -> int:
    size = (info.context or {}).get("vocab_size")
    if size is not None and token >= size:
        raise ValueError(f"should be a token of this model, which has {size}")
    return token


def _end(value: Any) -> Any:
    """-1, by which some say that nothing ends an answer, as None."""
    return None if isinstance(value, int) and value == -1 else value


def _ahead(value: Any) -> Any:
    if value in ("auto", "off") or (type(value) is int and 1 <= value <= _MOST_AHEAD):
        return value
    raise ValueError(f"should be a number from 1 to {_MOST_AHEAD}, 'auto' or 'off'")


_MOST_AHEAD = 1_000
Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=0)]
Short = Annotated[int, Strict(), Field(ge=0, le=10_000)]  # transformers walks through as many
Some = Annotated[int, Strict(), Field(ge=1)]
Number = Annotated[float, Strict()]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
Below = Annotated[float, Strict(), Field(ge=0, lt=1)]
Positive = Annotated[float, Strict(), Field(gt=0)]
Token = Annotated[int, Strict(), Field(ge=0), AfterValidator(_known)]
Tokens = Annotated[list[Token], Strict(), Field(min_length=1)]
Text = Annotated[str, Strict(), Field(min_length=1)]


class _Arguments(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, extra="ignore")


class Running(_Arguments):
    """How to run a request, which changes its answer by no more than rounding."""

    merge: Literal["auto", "always", "never"] = "auto"
    speculate: Annotated[Literal["auto", "off"] | int, BeforeValidator(_ahead)] = "off"
    drafter: Drafter | None = None
    graph: Flag = True
    compile: Flag = False

    @property
    def guesses(self) -> int | None:
        """Tokens to guess ahead, None for as many as pay."""
        return None if self.speculate == "auto" else 0 if self.speculate == "off" else self.speculate


class Request(Running):
    """Arguments of `generate` beside prompts and settings; a single one counts for all prompts."""

    classes: Annotated[list[str | None], Strict()] | None = None
    guidance_scale: Number | Annotated[list[Number], Strict()] | None = None
    num_return_sequences: Annotated[int, Strict(), Field(ge=1, le=1_000_000)] = 1
    batch_size: Some | None = None
    seed: Count | Annotated[list[Count], Strict()] | None = None


class DecodingOptions(_Arguments):
    """Fields of transformers' generation configuration that have a say in which token is picked, and when it ends."""

    max_length: Some | None = None
    max_new_tokens: Some | None = None
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    max_time: Positive | None = None
    stop_strings: Text | Annotated[list[Text], Strict(), Field(min_length=1)] | None = None
    do_sample: Flag | None = None
    temperature: Annotated[float, Strict(), Field(ge=0)] | None = None
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    top_h: Annotated[float, Strict(), Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Strict(), Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Below | None = None
    eta_cutoff: Below | None = None
    repetition_penalty: Positive | None = None
    encoder_repetition_penalty: Positive | None = None
    no_repeat_ngram_size: Short | None = None
    encoder_no_repeat_ngram_size: Short | None = None
    bad_words_ids: Annotated[list[Tokens], Strict(), Field(min_length=1)] | None = None
    renormalize_logits: Flag | None = None
    remove_invalid_values: Flag | None = None
    exponential_decay_length_penalty: tuple[Count, Positive] | None = None
    suppress_tokens: Annotated[list[Token], Strict()] | None = None
    begin_suppress_tokens: Annotated[list[Token], Strict()] | None = None
    sequence_bias: dict[tuple[Token, ...], Number] | list[tuple[Tokens, Number]] | None = None
    forced_bos_token_id: Token | None = None
    forced_eos_token_id: Token | Tokens | None = None
    pad_token_id: Token | None = None
    bos_token_id: Token | None = None
    eos_token_id: Annotated[Token | Tokens | None, BeforeValidator(_end)] = None


_SEARCH = "there is no beam search. as_transformers() has transformers' own"
_OUTPUT = "the answer holds tokens and evaluations only. An observer sees the logits"
_MODE = "there is one way to pick tokens, from the last logits"
_GUESSES = "tokens are guessed ahead by a drafter. Set speculate and drafter"
_UNSERVED: dict[str, tuple[Any, str]] = {
    "num_beams": (1, _SEARCH),
    "num_beam_groups": (1, _SEARCH),
    "diversity_penalty": (0, _SEARCH),
    "constraints": (None, _SEARCH),
    "force_words_ids": (None, _SEARCH),
    "num_return_sequences": (1, "it is an argument of `generate` itself"),
    "guidance_scale": (1, "it is an argument of `generate` itself"),
    "penalty_alpha": (0, _MODE),
    "dola_layers": (None, _MODE),
    "use_mtp": (False, _MODE),
    "is_assistant": (False, _MODE),
    "prompt_lookup_num_tokens": (None, _GUESSES),
    "assistant_model": (None, _GUESSES),
    "assistant_early_exit": (None, _MODE),
    "speculation_type": (None, _MODE),
    "token_healing": (False, "prompts are taken as they are"),
    "return_dict_in_generate": (False, _OUTPUT),
    "output_scores": (False, _OUTPUT),
    "output_logits": (False, _OUTPUT),
    "output_attentions": (False, _OUTPUT),
    "output_hidden_states": (False, _OUTPUT),
}
"""Options of transformers' `generate` with the value that changes nothing, and why there can be no other."""

_WITHOUT_EFFECT = (
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "prefill_chunk_size",
    "low_memory",
    "early_stopping",
    "length_penalty",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "max_matching_ngram_size",
    "decoder_start_token_id",
)
"""Fields that change no token here; a base model may well set them for its own `generate`."""


def request(**given: Any) -> Request:
    """Arguments of `generate`, checked."""
    given = {name: _plain(value) for name, value in given.items()}
    try:
        return Request.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, given).values())) from error


def decoding_options(
    options: Mapping[str, Any], *, vocab_size: int | None = None, known: Iterable[str] = ()
) -> dict[str, Any]:
    """Options of transformers' `generate` that have an effect, checked; `known`: what else may have been meant."""
    fields = {**GenerationConfig().to_dict(), **_UNSERVED}
    for name, value in options.items():
        if name not in fields:
            hint = suggest(name, [*known, *fields]) or "."
            raise ConfigError(f"Unknown option {name}={value!r}{hint} Remove or correct it.")
    found, problems = _sorted_out(options, vocab_size)
    if problems:
        raise ConfigError("\n".join(problems.values()))
    return found


def decoding_config(
    config: GenerationConfig | None,
    options: Mapping[str, Any],
    *,
    defaults: GenerationConfig,
    vocab_size: int,
    known: Iterable[str] = (),
) -> GenerationConfig:
    """Generation configuration of a request: its options over its configuration over that of the base model.

    Args:
        config: transformers' generation configuration, or None.
        options: fields of one, which win.
        defaults: the base model's; what cannot be served of it is left out with a warning.
        vocab_size: tokens of the model.
        known: what else may have been meant by an option that does not exist.

    Returns:
        A configuration of its own, in which only the request sets `max_length`.

    Raises:
        ConfigError: naming every setting of the request that is unknown, out of range or not served.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise ConfigError(f"generation_config should be a GenerationConfig of transformers, got {config!r}.")
    chosen = decoding_options(options, vocab_size=vocab_size, known=known)
    given, problems = _sorted_out({} if config is None else _set(config), vocab_size)
    if problems:
        raise ConfigError("generation_config: " + "\n".join(problems.values()))
    # What a base would like to be told changes no token.
    wanted = {name: v for name, v in _set(defaults).items() if _UNSERVED.get(name, (None, ""))[1] is not _OUTPUT}
    base, problems = _sorted_out(wanted, vocab_size)
    base.pop("max_length", None)
    if problems:
        warnings.warn(
            f"Left out of the base model's generation_config: {' '.join(problems.values())}", UserWarning, stacklevel=3
        )
    found = copy.deepcopy(config) if config is not None else GenerationConfig()
    for name in (*_UNSERVED, *_WITHOUT_EFFECT):
        if hasattr(found, name):
            setattr(found, name, None)
    for name, value in {**base, **given, **chosen}.items():
        setattr(found, name, value)
    if found.temperature == 0:
        if found.do_sample:
            raise ConfigError(
                "temperature should be greater than 0 to sample, got 0. For the likeliest token, set do_sample=False."
            )
        found.temperature = None
    if found.exponential_decay_length_penalty is not None and found.eos_token_id is None:
        raise ConfigError("exponential_decay_length_penalty makes an end token likelier. Name one as eos_token_id.")
    return found


def check_parts(processors: Any, criteria: Any, streamer: Any, **functions: Any) -> None:
    """Refuse what cannot be called in the loop; `functions` by the names of their arguments."""
    for name, several in (("logits_processor", processors), ("stopping_criteria", criteria)):
        if several is not None and not (isinstance(several, list) and all(map(callable, several))):
            raise ConfigError(f"{name} should be a list of functions, got {shown(several)}.")
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise ConfigError(f"streamer should have the methods put and end, got {shown(streamer)}.")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ConfigError(f"{name} should be a function, got {shown(function)}.")


def check_prompts(prompts: Any, vocab_size: int) -> None:
    """Refuse what are no prompts."""
    if isinstance(prompts, Encoded):
        check_tokens(prompts.input_ids, vocab_size)
        check_left_padding(prompts.input_ids, prompts.attention_mask)
    elif isinstance(prompts, Tensor):
        check_tokens(prompts, vocab_size)
    elif not isinstance(prompts, str):
        if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
            raise ConfigError(f"prompts should be a text, a conversation or a list of them, got {shown(prompts)}.")
        is_single = len(prompts) > 0 and isinstance(prompts[0], Mapping)
        for number, prompt in enumerate([prompts] if is_single else prompts):
            turns = [] if isinstance(prompt, str) else prompt
            if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
                raise ConfigError(
                    f"Prompt {number} should be a text or a list of messages, got {shown(prompt)}. Token ids go into "
                    "a tensor, (B, S)."
                )


def check_texts(texts: Any) -> None:
    """Refuse what are no texts with gaps."""
    if not isinstance(texts, str) and not (isinstance(texts, Sequence) and all(isinstance(t, str) for t in texts)):
        raise ConfigError(f"texts should be a text with gaps like <mask:8>, or a list of them, got {shown(texts)}.")


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Refuse tensors that are no batch of token ids."""
    if tokens.ndim != 2 or not tokens.numel():
        raise ConfigError(f"Token ids should have the shape (B, S), got {tuple(tokens.shape)}.")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ConfigError(f"Token ids should be whole numbers, got {tokens.dtype}.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ConfigError(f"Token ids should be 0 to {vocab_size - 1}, got {low if low < 0 else high}.")


def check_left_padding(tokens: Tensor, mask: Tensor) -> None:
    """Refuse masks under which an answer would not stand right after its prompt."""
    if mask.shape != tokens.shape:
        raise ConfigError(f"attention_mask should have the shape {tuple(tokens.shape)}, got {tuple(mask.shape)}.")
    wrong = ((mask != 0) & (mask != 1)).any(1) | (mask[:, -1] != 1) | (mask[:, 1:] < mask[:, :-1]).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ConfigError(
            f"attention_mask should be 0 on padding, which stands on the left, and 1 elsewhere, got "
            f"{shown(mask[row].tolist())} in row {row}."
        )


def check_gapped(gapped: Layout, vocab_size: int, context: int | None) -> None:
    """Refuse tokens and blocks that are no texts with gaps."""
    tokens, blocks = gapped.tokens, gapped.blocks
    check_tokens(tokens, vocab_size)
    check_left_padding(tokens, (blocks >= 0).long())
    first = (blocks >= 0).long().argmax(1, keepdim=True)
    for row, (gaps, begins, length) in enumerate(
        zip(
            (blocks >= 1).any(1).tolist(),
            blocks.gather(1, first)[:, 0].tolist(),
            (blocks >= 0).sum(1).tolist(),
            strict=True,
        )
    ):
        if not gaps or begins != 0 or (context is not None and length > context):
            raise ConfigError(
                f"Row {row} should begin with a known token, have a gap and at most {context} tokens, got the blocks "
                f"{shown(blocks[row].tolist())}."
            )


def _set(config: GenerationConfig) -> dict[str, Any]:
    """What a configuration says; transformers writes None for what it leaves open."""
    names = GenerationConfig().to_dict().keys() - {"transformers_version", "_from_model_config"}
    return {name: value for name, value in vars(config).items() if name in names and value is not None}


def _sorted_out(options: Mapping[str, Any], vocab_size: int | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Options that are good and have an effect, and what is wrong with the others, by name."""
    plain = {name: _plain(value) for name, value in options.items() if name not in _WITHOUT_EFFECT}
    problems = {}
    for name, (neutral, reason) in _UNSERVED.items():
        value = plain.pop(name, None)
        if value is not None and not (isinstance(value, (int, float)) and value == neutral):
            problems[name] = f"{name}={shown(value)} is not served: {reason}."
    try:
        # Copies as they are, not as the model would hold them: transformers knows its own types best.
        DecodingOptions.model_validate(plain, context={"vocab_size": vocab_size})
    except ValidationError as error:
        problems |= _problems(error, plain)
    return {name: value for name, value in plain.items() if name not in problems}, problems


def _problems(error: ValidationError, given: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each argument; of the branches of a union the one that got furthest speaks."""
    found: dict[str, Any] = {}
    for details in error.errors():
        name = str(details["loc"][0])
        if name not in found or _depth(details) > _depth(found[name]):
            found[name] = details
    lines = {}
    for name, details in found.items():
        what = str(details["ctx"]["error"]) if details["type"] == "value_error" else details["msg"]
        what = what.replace("Field required", "has too few entries").partition(" after validation")[0]
        what = what.replace("Input should be", "should be").replace("List should", "should").replace("String s", "s")
        inner = "" if details["input"] is given[name] else f" ({shown(details['input'])} in it)"
        lines[name] = f"{name} {what}, got {shown(given[name])}{inner}."
    return lines


def _depth(details: Any) -> tuple[int, bool]:
    return len(details["loc"]), not details["type"].endswith("_type")
