"""Readers of what the authors save: the first TESS, a RoBERTa, and diffusion and reward models of TESS 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2d_framework.errors import CheckpointError
from l2d_framework.types import ForeignCheckpoint
from l2d_plugins.converters.state_dicts import read_config, read_state

_MIXES = {"logits_mean": "mean", "logits_addition": "sum", "logits_max": "max", "logits_multiply": "product"}
_OTHER_NETWORKS = (
    "deepmind_conditional",
    "disable_timestep_embed",
    "self_condition_mix_logits_before_weights",
    "self_condition_zeros_after_softmax",
)
"""Switches that are off in all published models; set, the network computes something else."""
_NOT_THE_LANGUAGE_MODELS = {
    *_OTHER_NETWORKS,
    "_name_or_path",
    "architectures",
    "auto_map",
    "classifier_free_simplex_inputs",
    "classifier_free_uncond_input",
    "dtype",
    "empty_token_be_mask",
    "is_causal",
    "mask_padding_in_loss",
    "padding_side",
    "self_condition",
    "self_condition_mix_before_weights",
    "self_condition_mlp_projection",
    "simplex_value",
    "torch_dtype",
    "transformers_version",
}
_LOST_HEAD = (
    "The authors' Llama class leaves it out when it saves and draws a new one when it loads, so what this checkpoint "
    "generates in their code is meaningless, too."
)
_WORDS = "roberta.embeddings.word_embeddings.weight"
_COPY = "vocab_to_hidden_dim_embed.weight"
_TESS1_IGNORED = ("roberta.pooler.", "roberta.embeddings.position_ids", "roberta.embeddings.token_type_ids")
"""Buffers, and weights that the network does not use."""


def read_tess1(folder: Path) -> ForeignCheckpoint:
    """Read a checkpoint of github.com/allenai/tess-diffusion (arXiv:2305.08379), position i predicted at position i."""
    # The table that embeds probabilities is the embedding table itself, which the file holds again, transposed.
    config, state = read_config(folder), read_state(folder)
    time = {leaf: state.pop(f"timestep_embed.{leaf}", None) for leaf in ("weight", "bias")}
    own = {f"backbone.time.{leaf}": value for leaf, value in time.items() if value is not None}
    if len(own) < len(time) or not any(key.startswith("roberta.") for key in state):
        raise CheckpointError(
            f"{str(folder)!r} is no TESS 1 checkpoint: it needs roberta.*, timestep_embed.weight and "
            "timestep_embed.bias. Models over Mistral or Llama are of TESS 2: use --from tess2."
        )
    space, notes = _read_space(folder, config)
    is_linear = space["self_conditioning"] in ("mean", "sum")
    if not is_linear and not config.get("self_condition_mix_before_weights"):
        raise CheckpointError(
            f"{str(folder)!r} mixes embeddings by self_condition={config['self_condition']!r}; mixtures that are not "
            "linear can be converted only if self_condition_mix_before_weights is set."
        )
    copy = state.pop(_COPY, None)
    # Of two names for one storage, safetensors keeps either.
    if copy is not None and not torch.equal(state.setdefault(_WORDS, copy.T.contiguous()), copy.T):
        raise CheckpointError(
            f"{_COPY!r} of {str(folder)!r} is not its embedding table, so the network embeds states otherwise than "
            "tokens. Such a network cannot be converted."
        )
    return ForeignCheckpoint(
        parts=_parts(space, time_bias=True, label_shift=False),
        own=own,
        base_config=_plain_config(config),
        base={name: value for name, value in state.items() if not name.startswith(_TESS1_IGNORED)},
        notes=() if config.get("self_condition") else notes,
    )


def read_tess2(folder: Path) -> ForeignCheckpoint:
    """Read a checkpoint of github.com/hamishivi/tess-2, such as `hamishivi/tess2`."""
    config, state = read_config(folder), read_state(folder)
    if "timestep_embed.weight" not in state:
        problem = (
            "it is a reward model. Use --from tess2-reward"
            if "score.weight" in state
            else "it has no timestep_embed.weight. Give the folder of a diffusion model"
        )
        raise CheckpointError(f"{str(folder)!r} is no TESS 2 checkpoint: {problem}.")
    if any(key.startswith("roberta.") for key in state):
        raise CheckpointError(f"{str(folder)!r} is a TESS 1 checkpoint. Use --from tess1.")
    time = {"backbone.time.weight": state.pop("timestep_embed.weight")}
    space, notes = _read_space(folder, config)
    is_lost = (
        config["model_type"] == "llama" and "lm_head.weight" not in state and not config.get("tie_word_embeddings")
    )
    return ForeignCheckpoint(
        parts=_parts(space, attention="causal" if config.get("is_causal") else "bidirectional", label_shift=True),
        own=time,
        base_config=_plain_config(config),
        base=_without_rotations(state),
        lost={"lm_head.weight": _LOST_HEAD} if is_lost else {},
        chat_template="tulu",
        notes=notes,
    )


def read_tess2_reward(folder: Path) -> ForeignCheckpoint:
    """Read a reward model of the authors' TESS 2 code, such as `hamishivi/tess_mistral_rm`."""
    config, state = read_config(folder), read_state(folder)
    if "score.weight" not in state:
        hint = " Use --from tess2." if "timestep_embed.weight" in state else ""
        raise CheckpointError(f"{str(folder)!r} is no reward model: it has no score.weight.{hint}")
    counts = {len(state["score.weight"]), len(config.pop("id2label", None) or "1"), config.pop("num_labels", 1)}
    config.pop("label2id", None)
    if counts != {1}:
        raise CheckpointError(
            f"{str(folder)!r} has {max(counts)} outputs; a reward model has one. Give the folder of a reward model."
        )
    return ForeignCheckpoint(None, {}, _plain_config(config) | {"num_labels": 1}, _without_rotations(state))


def _parts(space: dict[str, Any], **backbone: Any) -> dict[str, Any]:
    return {
        "schedule": {"name": "cosine"},
        "parametrization": space,
        "backbone": {"name": "in_place", **backbone},
        "block_size": None,
    }


def _read_space(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The `parametrization` that stored flags describe, and sentences on what was not taken as stored."""
    for name in _OTHER_NETWORKS:
        if config.get(name):
            raise CheckpointError(
                f"{str(folder)!r} sets {name}={config[name]!r}; only networks without it can be converted."
            )
    # The authors' loader switches self-conditioning off unless a command line switches it on, and stores that, so flags
    # are believed only if they name a way to mix.
    chosen, notes = config.get("self_condition"), []
    if not chosen:
        chosen = "logits_mean"
        notes.append(
            "The stored flags switch self-conditioning off, which is what the authors' loader does by default; it is "
            "taken to be logits_mean, with which their scripts train."
        )
    elif not config.get("self_condition_mix_before_weights"):
        notes.append(
            f"Self-conditioning {chosen} is stored as inactive; it is taken to be active, as in their scripts."
        )
    if chosen not in _MIXES:
        raise CheckpointError(
            f"{str(folder)!r} mixes predictions by self_condition={chosen!r}; only {', '.join(_MIXES)} can be "
            "converted."
        )
    k = float(config.get("simplex_value", 5.0))
    return {"name": "simplex", "k": k, "self_conditioning": _MIXES[chosen]}, tuple(notes)


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that transformers' own class of the language model knows."""
    return {name: value for name, value in config.items() if name not in _NOT_THE_LANGUAGE_MODELS}


def _without_rotations(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the rotary frequencies that old versions of transformers saved along."""
    return {name: value for name, value in state.items() if not name.endswith("rotary_emb.inv_freq")}
