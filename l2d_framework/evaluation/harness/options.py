"""What `--model_args` and `--gen_kwargs` may say; unknown names are refused before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from l2d_framework.component import Component
from l2d_framework.config import SamplingSection
from l2d_framework.errors import ConfigError, suggest
from l2d_framework.evaluation.search.search import OPTIONS as SEARCHING
from l2d_framework.evaluation.search.search import Search, read_search, split_options
from l2d_framework.generation import arguments
from l2d_framework.models.unloaded import CLASS, HINT, SCALE

DIFFUSING = (*SamplingSection.model_fields, CLASS, SCALE)
"""Options of diffusion, allowed in both places; those of `--gen_kwargs` win."""

PASSED = (
    *("tokenizer", "truncation", "logits_cache", "max_length", "device", "batch_size", "max_batch_size"),
    *("add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args"),
)
"""Options of lm_eval's own Hugging Face model that mean the same here."""

RUNNING = tuple(arguments.Running.model_fields)
"""How to run, for `--model_args`: changes no answer but by rounding."""

PLACING = ("device_map", "max_memory", "offload_folder")
"""Where layers lie, for models larger than a device."""

_OWN = ("pretrained", "base", "dtype", "revision", "scoring", "noise_samples", "pseudo_times", *PLACING)


def check_model_options(options: Mapping[str, Any]) -> None:
    """Refuse unknown model arguments."""
    # The harness adds the last by itself; no code of a model folder is ever run.
    known = (*_OWN, *RUNNING, *PASSED, *DIFFUSING, *SEARCHING, "trust_remote_code")
    for name, value in options.items():
        if name not in known:
            hint = suggest(name, known) or "."
            raise ConfigError(f"Unknown model argument {name}={value!r}{hint} Remove or correct it in --model_args.")


def diffusing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of diffusion among others; a single guidance as a list of one."""
    chosen = {name: value for name, value in options.items() if name in DIFFUSING}
    if isinstance(chosen.get("guidance"), (str, Mapping, Component)):
        chosen["guidance"] = [chosen["guidance"]]
    return chosen


@dataclass(frozen=True)
class Plan:
    """How to answer the requests of one set of generation options."""

    stop_strings: list[str]
    count: int  # most tokens of an answer
    decoding: dict[str, Any]  # fields of transformers' generation configuration
    options: dict[str, Any]  # of diffusion, and `class_hint`
    search: Search | None = None


def read_plan(
    generation: Mapping[str, Any],
    default_count: int,
    end: str,
    *,
    search: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> Plan:
    """Plan of a request; its own options of search win over `search`, those for all requests."""
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        value = generation.get(name)
        if value is not None and not (str(value).isdecimal() and int(value) > 0):
            raise ConfigError(f"{name} should be a whole number above 0, got {value!r}. Correct it in --gen_kwargs.")
    # The names of options are checked where lm_eval is not installed, too.
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    try:
        rest: dict[str, Any] = dict(normalize_gen_kwargs(dict(generation), default_count))
        stop_strings = handle_stop_sequences(rest.pop("until", None), eos=end)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{error}, got {dict(generation)}. Correct it in --gen_kwargs.") from error
    if not all(isinstance(string, str) for string in stop_strings):
        raise ConfigError(
            f"until should be a text or a list of texts, got {stop_strings!r}. Correct it in --gen_kwargs."
        )
    count = int(rest.pop("max_gen_toks"))
    searching, rest = split_options(rest)
    options = diffusing(rest) | ({HINT: rest[HINT]} if HINT in rest else {})
    decoding = {name: value for name, value in rest.items() if name not in options}
    known = set(GenerationConfig().to_dict()) - {"max_length", "max_new_tokens", "num_return_sequences"}
    for name, value in decoding.items():
        if name not in known | {"temperature"}:
            hint = suggest(name, [*known, *DIFFUSING, *SEARCHING, HINT, "max_gen_toks", "until"]) or "."
            raise ConfigError(f"Unknown generation option {name}={value!r}{hint} Remove or correct it in --gen_kwargs.")
    if not decoding.get("do_sample") or not decoding.get("temperature"):
        decoding.pop("temperature", None)
    if decoding.get("do_sample") in (0, 1):  # as a command line may well spell it
        decoding["do_sample"] = bool(decoding["do_sample"])
    decoding = arguments.decoding_options(decoding, vocab_size=vocab_size)
    return Plan(stop_strings, count, decoding, options, read_search({**(search or {}), **searching}, options.get(HINT)))


def shortest(settings: SamplingSection) -> dict[str, Any]:
    """As few evaluations as the solver can make, to try out a batch; none of them is larger than another."""
    steps = settings.num_inference_steps
    return {} if not steps or settings.solver.is_adaptive else {"num_inference_steps": settings.solver.stages + 1}
