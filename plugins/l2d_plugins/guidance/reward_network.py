"""The reward model of `reward_gradient`: refused before its weights are loaded, loaded once, read on soft tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from l2d_framework.errors import ConfigError, UnsupportedModelError
from l2d_framework.opening import new_model
from l2d_plugins.companions import OPENING, Companion, stamps
from l2d_plugins.twins import run_body

_REWARD = Companion(
    "Reward model",
    "sequence classifier",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    ("llama", "mistral", "qwen2"),
    "Give the folder that `l2d train-reward` wrote, or a hub id, such as org/name, as `model` of the guidance "
    "'reward_gradient'.",
    "Train a reward model with `l2d train-reward`, and give its folder.",
)


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
    with OPENING:
        _check(name, tokenizer, size, needs_end, stamps(name))


def reward_bytes(name: str, dtype: torch.dtype) -> int:
    """Size of its weights."""
    return _REWARD.bytes(name, dtype)


def load_reward_model(name: str, device: torch.device, dtype: torch.dtype) -> RewardNetwork:
    """The frozen reward model, loaded once and kept for the next call; a folder written again is loaded again."""
    with OPENING:
        return _load(name, device, dtype, stamps(name))


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
        ours, theirs = _REWARD.vocabularies(name, tokenizer)
        why = "Its gradient would be about other words. Train a reward model on the same base with `l2d train-reward`."
        _REWARD.refuse_vocabulary(name, ours, theirs, why)


@lru_cache(maxsize=2)
@torch.inference_mode(False)
def _load(name: str, device: torch.device, dtype: torch.dtype, stamps: tuple[int, ...]) -> RewardNetwork:
    config = _config(name)
    model = _REWARD.load(transformers.AutoModelForSequenceClassification, name, device, dtype)
    layer = model.get_input_embeddings()
    # Gemma's embedding layers scale the rows that they look up.
    scale = getattr(layer, "embed_scale", None)
    table = layer.weight if scale is None else layer.weight * scale.to(dtype)
    network = RewardNetwork(name, model.base_model, model.score, table.detach(), _ends(config))
    network.prove()
    return network


def _config(name: str) -> Any:
    """Its configuration, refused unless it is one of a sequence classifier with one output."""
    config = _REWARD.config(name)
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
