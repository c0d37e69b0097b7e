"""Reader of checkpoints of the first TESS, whose network is a RoBERTa."""

from __future__ import annotations

from pathlib import Path

import torch

from l2d_framework.errors import CheckpointError
from l2d_framework.types import ForeignCheckpoint
from l2d_plugins.converters.stored import read_config, read_state
from l2d_plugins.converters.tess2_reference import plain_config, read_space

_WORDS = "roberta.embeddings.word_embeddings.weight"
_COPY = "vocab_to_hidden_dim_embed.weight"
_IGNORED = ("roberta.pooler.", "roberta.embeddings.position_ids", "roberta.embeddings.token_type_ids")
"""Buffers, and weights that the network does not use."""


def read_tess1(folder: Path) -> ForeignCheckpoint:
    """Read a checkpoint of the authors' first TESS code.

    Position i is predicted at position i. The table that embeds probabilities is the embedding table itself, which the
    file holds a second time, transposed.

    Args:
        folder: in transformers' layout, with `roberta.*` and `timestep_embed.*` among the weights.

    Returns:
        Its parts.

    Raises:
        CheckpointError: if a file is missing or damaged, the folder holds another kind of model, or its two tables
            differ.

    Source: key names and flags from github.com/allenai/tess-diffusion; Mahabadi et al. 2023, arXiv:2305.08379.
    """
    config, state = read_config(folder), read_state(folder)
    time = {leaf: state.pop(f"timestep_embed.{leaf}", None) for leaf in ("weight", "bias")}
    own = {f"backbone.time.{leaf}": value for leaf, value in time.items() if value is not None}
    if len(own) < len(time) or not any(key.startswith("roberta.") for key in state):
        raise CheckpointError(
            f"{str(folder)!r} is no TESS 1 checkpoint: it needs roberta.*, timestep_embed.weight and "
            "timestep_embed.bias. Models over Mistral or Llama are of TESS 2: use --from tess2."
        )
    space, notes = read_space(folder, config)
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
        parts={
            "schedule": {"name": "cosine"},
            "parametrization": space,
            "backbone": {"name": "in_place", "time_bias": True, "label_shift": False},
            "block_size": None,
        },
        own=own,
        base_config=plain_config(config),
        base={name: value for name, value in state.items() if not name.startswith(_IGNORED)},
        notes=() if config.get("self_condition") else notes,
    )
