"""Reader of checkpoints written by the authors' L2D code: one `pytorch_model.bin` and its `config.json`."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2d_framework.errors import CheckpointError
from l2d_framework.types import ForeignCheckpoint

_MODULES = {
    "flow_token_embedder.embedder.layers_module.0": "parametrization.vocabulary",
    "flow_to_lm_encoder.embedder.layers_module.0": "parametrization.translation.0",
    "flow_to_lm_encoder.embedder.layers_module.2": "parametrization.translation.2",
    "timestep_embedder.mlp.0": "backbone.conditioning.time.0",
    "timestep_embedder.mlp.2": "backbone.conditioning.time.2",
    "data_label_embedder": "backbone.conditioning.classes",
    "modulation_head.mlp.0": "backbone.conditioning.final.0",
    "modulation_head.mlp.2": "backbone.conditioning.final.2",
}
_LAYER = re.compile(r"layers\.(\d+)\.modulation_head\.mlp\.(\d)$")
_PROJECTION = re.compile(r"layers\.(\d+)\.(self_attn|mlp)\.flow_(\w+_proj)$")
_EXPECTED = {
    "freeze_modulation_at_flow_start": False,
    "modulate_hidden_states": False,
    "full_dit_modulation": True,
    "flow_representation_normalize": True,
    "flow_to_lm_timestep_rescaling": 1.0,
    "separate_flow_params": True,
}
"""Switches of the authors' code that the published models leave at these values; others compute something else."""


def read_l2d_reference(folder: Path) -> ForeignCheckpoint:
    """Read a checkpoint of the authors' L2D code (github.com/SakanaAI/L2D); sizes are taken from the weights."""
    # Diffusion settings stand at the top level or under `flow_config`. The class table's last row is the null class, as
    # here; LoRA factors are stored as (in, r) and (r, out); the frozen language model is part of the file.
    config, state = _read(folder)
    settings = config.pop("flow_config", {}) or {}
    settings = {**{k: v for k, v in config.items() if k in _EXPECTED or k.startswith("flow_")}, **settings}
    settings.setdefault("noise_rescaling", config.get("noise_rescaling", 64.0))
    for name, wanted in _EXPECTED.items():
        if settings.get(name, wanted) != wanted:
            raise CheckpointError(
                f"{str(folder)!r} sets {name}={settings[name]!r}; only {wanted!r}, which the published models use, can "
                "be converted."
            )
    own: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for key, value in state.items():
        target = _target(key)
        if target is not None:
            own[target] = value.T.contiguous() if key.endswith((".A", ".B")) else value
        elif "wrapped_layer" not in key:
            base[key] = value
    strange = sorted(key for key in base if "flow_" in key or "modulation" in key or "embedder" in key)
    if strange or not own:
        raise CheckpointError(
            f"{str(folder)!r} is not laid out like a released L2D checkpoint: "
            + (f"it holds {strange[0]!r}." if strange else "it holds no diffusion weights.")
        )
    return ForeignCheckpoint(_parts(own, settings), own, config, base)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = folder / "pytorch_model.bin"
    for file in (path, folder / "config.json"):
        if not file.is_file():
            raise CheckpointError(f"{str(folder)!r} holds no {file.name}. Give the folder of an L2D checkpoint.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{str(folder)!r} is damaged or holds more than weights ({error}).") from error
    # Training snapshots of the authors' code wrap the state under another key than evaluation expects.
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise CheckpointError(
            f"{str(folder)!r} is not laid out like a released L2D checkpoint: it holds no named weights."
        )
    return config, state


def _target(key: str) -> str | None:
    """This package's name for a diffusion weight, None for a weight of the language model."""
    module, _, leaf = key.removeprefix("model.").rpartition(".")
    if module in _MODULES:
        return f"{_MODULES[module]}.{leaf}"
    if match := _LAYER.match(module):
        return f"backbone.conditioning.layers.{match[1]}.{match[2]}.{leaf}"
    if match := _PROJECTION.match(module):
        shadow = f"backbone.shadows.{match[1]}.shadow.{match[2]}.{match[3]}"
        return f"{shadow}.lora_{leaf}.diffusion.weight" if leaf in "AB" else f"{shadow}.{leaf}"
    return None


def _parts(own: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    ranks = {value.shape[0] for name, value in own.items() if ".lora_A." in name}
    classes = own.get("backbone.conditioning.classes.weight")
    count = 0 if classes is None else len(classes) - 1
    backbone: dict[str, Any] = {
        "name": "two_stream",
        "variant": "lora" if ranks else "full",
        "time_features": own["backbone.conditioning.time.0.weight"].shape[1],
        "conditioning_size": own["backbone.conditioning.time.0.weight"].shape[0],
        "num_classes": count,
    }
    if ranks:
        backbone |= {"rank": ranks.pop(), "alpha": float(settings.get("flow_lora_alpha", 32.0))}
    return {
        "schedule": {"name": "linear"},
        "parametrization": {
            "name": "embedding",
            "size": own["parametrization.vocabulary.weight"].shape[0],
            "hidden": own["parametrization.translation.0.weight"].shape[0],
            "prior_scale": float(settings["noise_rescaling"]),
        },
        "backbone": backbone,
        "block_size": 1,
    }
