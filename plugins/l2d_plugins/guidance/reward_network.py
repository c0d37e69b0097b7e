"""The reward model of `reward_gradient`: refused before its weights are loaded, loaded once, read on soft tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from l2d_framework.errors import CheckpointError, ConfigError, UnsupportedModelError
from l2d_framework.opening import new_model, open_config, open_model, open_tokenizer
from l2d_plugins.families import advice
from l2d_plugins.twins import run_body

_OPENING = Lock()
"""Held while a model is opened: once is enough, and transformers changes settings of the whole process meanwhile."""


@dataclass(frozen=True)
class RewardNetwork:
    """A frozen sequence classifier with one output that reads from left to right."""

    name: str  # what it was asked for as
    body: nn.Module  # its decoder, in evaluation mode
    score: nn.Module  # its head, from H to 1
    table: Tensor  # what the decoder reads for every token, (V, H)
    ends: tuple[int, ...]  # ids of end tokens

    def rewards(self, inputs: Tensor) -> Tensor:
        """Reward (B, T), float32, of every beginning of gapless embedded tokens, (B, T, H), of the type of `table`."""
        return self.score(run_body(self.body, inputs_embeds=inputs)).squeeze(-1).float()  # type: ignore[no-any-return]

    def check_width(self, size: int) -> None:
        """Refuse logits over another number of tokens than this model embeds."""
        if len(self.table) != size:
            raise ConfigError(
                f"Reward model {self.name!r} embeds {len(self.table)} tokens, but the diffusion model predicts {size}. "
                "Guidance needs the same vocabulary: train a reward model on the same base with `l2d train-reward`."
            )

    def prove(self) -> None:
        """See on an example that no output depends on later inputs."""
        inputs = self.table[:5][None]
        later = torch.cat([inputs[:, :-1], inputs[:, -1:] + 1], 1)
        with torch.no_grad():
            plain, changed = (run_body(self.body, inputs_embeds=given) for given in (inputs, later))
        if not torch.allclose(plain[:, :-1].float(), changed[:, :-1].float(), rtol=1e-3, atol=1e-3):
            raise UnsupportedModelError(
                f"Reward model {self.name!r} lets tokens see later ones, so no output is the reward of a text so far. "
                "Choose a sequence classifier over a decoder, such as LlamaForSequenceClassification."
            )


def check_reward_model(name: str, tokenizer: Any, *, needs_end: bool) -> None:
    """Refuse a reward model that cannot guide, without loading its weights; `tokenizer` may be None."""
    size = None if tokenizer is None else len(tokenizer)
    with _OPENING:
        _check(name, tokenizer, size, needs_end, _stamps(name))


def load_reward_model(name: str, device: torch.device, dtype: torch.dtype) -> RewardNetwork:
    """The frozen reward model, loaded once and kept for the next call; a folder written again is loaded again."""
    with _OPENING:
        return _load(name, device, dtype, _stamps(name))


def _stamps(name: str) -> tuple[int, ...]:
    """What changes when a folder is written again."""
    return tuple(sorted(file.stat().st_mtime_ns for file in Path(name).iterdir())) if Path(name).is_dir() else ()


@lru_cache(maxsize=4)
def _check(name: str, tokenizer: Any, size: int | None, needs_end: bool, stamps: tuple[int, ...]) -> None:
    """Every request asks, and comparing large vocabularies takes a while."""
    config = _config(name)
    with torch.device("meta"):
        empty = new_model(transformers.AutoModelForSequenceClassification, config)
    if not isinstance(getattr(empty, "score", None), nn.Module):
        raise UnsupportedModelError(
            f"Reward model {name!r} is a {type(empty).__name__}, which has no `score` head over a decoder. Choose one "
            "that has, such as LlamaForSequenceClassification, or train one with `l2d train-reward`."
        )
    if needs_end and not _ends(config):
        raise ConfigError(
            f"position='expected_end' needs an end token; the config.json of reward model {name!r} has no "
            "eos_token_id. Add it, or use position='canvas_end'."
        )
    if tokenizer is not None:
        _check_vocabulary(name, tokenizer)


@lru_cache(maxsize=2)
@torch.inference_mode(False)
def _load(name: str, device: torch.device, dtype: torch.dtype, stamps: tuple[int, ...]) -> RewardNetwork:
    config = _config(name)
    model: Any
    model, report = open_model(transformers.AutoModelForSequenceClassification, name, dtype=dtype)
    if report["missing_keys"]:
        raise CheckpointError(
            f"Reward model {name!r} lacks the weights {sorted(report['missing_keys'])[:3]}, which would be random. "
            "Download or train it again."
        )
    model = model.to(device).eval().requires_grad_(False)
    layer = model.get_input_embeddings()
    # Gemma's embedding layers scale the rows that they look up.
    scale = getattr(layer, "embed_scale", None)
    table = layer.weight if scale is None else layer.weight * scale.to(dtype)
    network = RewardNetwork(name, model.base_model, model.score, table.detach(), _ends(config))
    network.prove()
    return network


def _config(name: str) -> Any:
    """Its configuration, refused unless it is one of a sequence classifier with one output."""
    is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ConfigError(
            f"There is no folder {name!r}. Give the folder that `l2d train-reward` wrote, or a hub id, such as "
            "org/name, as `model` of the guidance 'reward_gradient'."
        )
    try:
        config: Any = open_config(name)
    except CheckpointError as error:
        raise ConfigError(
            f"Reward model {name!r} is neither a model folder here nor a hub repository that can be reached: {error}"
        ) from error
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UnsupportedModelError(
            f"Reward model {name!r} is of type {config.model_type!r}, for which there is no sequence classifier. "
            f"{advice(config.model_type, ('llama', 'mistral', 'qwen2'))}"
        )
    kind: Any = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    wanted, saved = kind.__name__, config.architectures or []
    if wanted not in saved:
        raise UnsupportedModelError(
            f"Reward model {name!r} was saved as {' or '.join(saved) or 'no architecture'}, not as {wanted}. Train a "
            "reward model with `l2d train-reward`, and give its folder."
        )
    if config.num_labels != 1:
        raise ConfigError(
            f"Reward model {name!r} has {config.num_labels} outputs; a reward is one number. Choose a model with "
            "num_labels=1."
        )
    return config


def _ends(config: Any) -> tuple[int, ...]:
    text = config.get_text_config()
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    # Some configs name tokens that their vocabulary lacks.
    return tuple({end for end in ends if end is not None and 0 <= end < text.vocab_size})


def _check_vocabulary(name: str, tokenizer: Any) -> None:
    """Refuse another vocabulary, naming the first token that differs."""
    try:
        theirs = _by_id(open_tokenizer(name))
    except CheckpointError as error:
        raise ConfigError(
            f"Reward model {name!r} has no tokenizer that could be compared with the model's ({error}). Put the "
            "tokenizer it was trained with into its folder."
        ) from error
    ours = _by_id(tokenizer)
    if ours != theirs:
        first = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        raise ConfigError(
            f"Reward model {name!r} has another vocabulary: token {first} is {theirs.get(first)!r} there and "
            f"{ours.get(first)!r} here ({len(theirs)} and {len(ours)} tokens). Its gradient would be about other "
            "words. Train a reward model on the same base with `l2d train-reward`."
        )


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}
