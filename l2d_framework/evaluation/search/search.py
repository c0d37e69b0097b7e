"""Token search of the L2D paper: transformers' stochastic beam search, and a sampled pick among its hypotheses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from l2d_framework.config.files import parse_json, read_text
from l2d_framework.config.sections import Section
from l2d_framework.config.validation import validated
from l2d_framework.diffusion.rng import categorical, keyed_generator, stream_key
from l2d_framework.errors import ConfigError, suggest
from l2d_framework.generation.causal_lm import DiffusionForCausalLM

PREFIX = "search_"
FILE, CATEGORY = "search", "search_category"


class Search(Section):
    """How to search (arXiv:2501.15781, Table 2 and appendix).

    After each token transformers draws (1 + end tokens) x `beams` continuations, at least twice `beams`, without
    replacement from the distribution over all hypotheses' continuations, and goes on with the likeliest `beams` of
    those that have not ended; of the first `beams` drawn, those that end are finished. So more end tokens make it
    greedier. The score of a finished hypothesis of L tokens, its end token included, is its log-likelihood over
    L^length_power; the answer is drawn with the scores over `temperature` as logits.

    The paper's budget is 15 hypotheses for search alone and 15 evaluations for L2D alone. "L2D and token search" with
    half the budget each is read as 7 hypotheses, each token of each with 7 evaluations.
    """

    beams: int = Field(default=15, ge=2)
    """Hypotheses kept."""
    length_power: float = 1.0
    """Power of the length that the log-likelihood is divided by; the larger, the longer the answers."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens of the prompt and the answer so far become less likely, as transformers defines it; it counts in
    the score too."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the final pick; 0 for the best hypothesis."""


OPTIONS = (FILE, CATEGORY, *(PREFIX + name for name in Search.model_fields))
"""Names of everything about search among the options of an evaluation."""


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell options about search from others."""
    chosen = {name: value for name, value in options.items() if name in OPTIONS}
    return chosen, {name: value for name, value in options.items() if name not in OPTIONS}


def read_search(options: Mapping[str, Any], hint: str | None = None) -> Search | None:
    """The search that options ask for; the fields of `Search` among them win over those of the file's category."""
    if not options:
        return None
    file, category = options.get(FILE), options.get(CATEGORY)
    fields: dict[str, Any] = {}
    if file is not None:
        fields = _entry(_categories(Path(str(file))), category or hint, str(file))
    elif category is not None:
        raise ConfigError(f"{CATEGORY}={category!r} names an entry of a file. Add {FILE}=FILE, or leave it out.")
    fields |= {name: options[PREFIX + name] for name in Search.model_fields if PREFIX + name in options}
    return validated(Search, fields, FILE)


def check_search(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings by category, JSON-ready, or None without options; refused if wrong, before a model is loaded."""
    if not options:
        return None
    chosen = options.get(CATEGORY)
    names = [chosen] if FILE not in options or chosen is not None else [*_categories(Path(str(options[FILE])))]
    settings = {name: read_search(options, name) for name in names}
    return {str(name): None if one is None else one.model_dump() for name, one in settings.items()}


def _categories(path: Path) -> dict[str, Any]:
    try:
        categories = parse_json(read_text(path), str(path))["categories"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{FILE}={str(path)!r} cannot be read as a result of `l2d tune-search` ({type(error).__name__}: {error}). "
            "Name the file it wrote, or leave the option out."
        ) from error
    if not (isinstance(categories, dict) and categories and all(isinstance(e, dict) for e in categories.values())):
        raise ConfigError(f"{FILE}={str(path)!r} holds no tuned category. Run `l2d tune-search` to its end.")
    return dict(categories)


def _entry(categories: dict[str, Any], wanted: str | None, file: str) -> dict[str, Any]:
    if wanted is None and len(categories) == 1:
        wanted = next(iter(categories))
    if wanted is None or wanted not in categories:
        hint = suggest(str(wanted), categories) or "."
        raise ConfigError(f"{file!r} has no category {wanted!r}{hint} Set {CATEGORY} to one of {sorted(categories)}.")
    return dict(categories[wanted])


def search(
    model: DiffusionForCausalLM, prompt: Tensor, settings: Search, *, name: str, decoding: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """Tokens of one answer up to its end, and for each the network's passes beside a plain language model's one."""
    if model.sampling.solver.batch_coupled and model.sampling.num_inference_steps != 0:
        raise ConfigError(
            f"Solver {model.sampling.solver.component_name()!r} solves rows together, so hypotheses would influence "
            "each other. Choose another solver for search."
        )
    spent: list[int] = []
    watched = copy.copy(model)  # others may be searching with the same
    # With h hypotheses and e evaluations; a plain language model needs one pass.
    watched.on_step = lambda evaluations: spent.append(int((evaluations + 1).sum()) - 1)
    output = _hypotheses(watched, prompt, settings, name, decoding)
    scores, lengths = output.sequences_scores.float().cpu(), (output.beam_indices >= 0).sum(1).tolist()
    if settings.temperature == 0:
        chosen = int(scores.argmax())
    else:
        # Named by seed and request, as all random numbers, so neither batch nor order matters.
        number = torch.tensor(keyed_generator(model.sampling.seed, name, "pick").random(dtype="float32"))
        chosen = int(categorical((scores / settings.temperature).softmax(-1), number))
    tokens = output.sequences[chosen, len(prompt) : len(prompt) + lengths[chosen]].tolist()
    # What longer hypotheses spend after the end of the answer counts with its last token.
    passes = spent[: len(tokens)]
    passes[-1] += sum(spent[len(tokens) :])
    return tokens, passes


def _hypotheses(
    model: DiffusionForCausalLM, prompt: Tensor, settings: Search, name: str, decoding: Mapping[str, Any]
) -> Any:
    """What transformers' stochastic beam search found, with scores and lengths."""
    device = model.device
    generate: Any = model.generate  # transformers' own annotations allow no call of it
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(stream_key(model.sampling.seed, name, "search")[:7], "little"))
        return generate(
            prompt[None].to(device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=device),
            request_keys=[name],
            **dict(decoding)
            | {
                "do_sample": True,
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
                "num_beams": settings.beams,
                "num_return_sequences": settings.beams,
                "length_penalty": settings.length_power,
                "repetition_penalty": settings.repetition_penalty,
                "early_stopping": True,  # as soon as there are so many finished hypotheses
                "return_dict_in_generate": True,
                "output_scores": True,
            },
        )
