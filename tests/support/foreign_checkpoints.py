"""Folders in the layouts of the authors' code, written from models of this package."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from l2d_framework.models.diffusion_lm import DiffusionLM

THEIRS = {
    "parametrization.vocabulary": "flow_token_embedder.embedder.layers_module.0",
    "parametrization.translation": "flow_to_lm_encoder.embedder.layers_module",
    "backbone.conditioning.time": "timestep_embedder.mlp",
    "backbone.conditioning.classes": "data_label_embedder",
    "backbone.conditioning.final": "modulation_head.mlp",
}
"""The authors' name for the beginning of ours."""


def their_name(name: str) -> str:
    """The authors' name for an L2D parameter of this package."""
    for ours, theirs in THEIRS.items():
        if name.startswith(ours):
            return "model." + name.replace(ours, theirs, 1)
    if found := re.match(r"backbone\.conditioning\.layers\.(\d+)\.(.*)", name):
        return f"model.layers.{found[1]}.modulation_head.mlp.{found[2]}"
    found = re.match(r"backbone\.shadows\.(\d+)\.shadow\.(\w+)\.(\w+_proj)\.(.*)", name)
    leaf = {"lora_A.diffusion.weight": "A", "lora_B.diffusion.weight": "B"}.get(found[4], found[4])
    return f"model.layers.{found[1]}.{found[2]}.flow_{found[3]}.{leaf}"


def write_l2d(folder: Path, model: DiffusionLM, **settings: Any) -> Path:
    """The folder that the authors' L2D code would write for a model; `settings` are of their `flow_config`."""
    lm = model.backbone.lm
    state = {name: weight.clone() for name, weight in lm.state_dict().items()}
    for name, weight in model.own_parameters().items():
        theirs = their_name(name)
        state[theirs] = weight.detach().T.contiguous() if theirs.endswith((".A", ".B")) else weight.detach().clone()
        if theirs.endswith(".A"):
            plain = theirs.replace("flow_", "").removesuffix("A")
            for leaf in ("weight", "bias"):
                if plain + leaf in state:
                    state[theirs.removesuffix("A") + "wrapped_layer." + leaf] = state[plain + leaf].clone()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({**lm.config.to_diff_dict(), "flow_config": settings}))
    return folder


FLAGS = {
    "self_condition": "logits_mean",
    "self_condition_mix_before_weights": True,
    "self_condition_mix_logits_before_weights": False,
    "self_condition_zeros_after_softmax": False,
    "self_condition_mlp_projection": False,
    "deepmind_conditional": False,
    "classifier_free_simplex_inputs": False,
    "classifier_free_uncond_input": "empty_token",
    "empty_token_be_mask": False,
    "is_causal": False,
    "mask_padding_in_loss": False,
    "padding_side": "right",
    "disable_timestep_embed": False,
}
"""What the authors' code stores beside the language model's settings."""


def store(
    folder: Path, config: dict[str, Any], state: dict[str, Tensor], *, shards: int = 1, suffix: str = "safetensors"
) -> Path:
    """A folder in transformers' layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(state)
    files = (
        [f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}" for i in range(shards)] if shards > 1 else [f"{stem}.{suffix}"]
    )
    places = {name: files[i % shards] for i, name in enumerate(names)}
    for file in files:
        part = {name: state[name].contiguous() for name in names if places[name] == file}
        if suffix == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def write_tess2(folder: Path, lm: PreTrainedModel, time_embedding: Tensor, **how: Any) -> Path:
    """The folder that the authors' TESS 2 code would write for a language model and the (H, 1) embedding of time.

    `flags` among `how` replaces settings, `change` edits the weights; the rest goes to `store`.
    """
    state = {name: weight.clone() for name, weight in lm.state_dict().items()}
    state["timestep_embed.weight"] = time_embedding
    if change := how.pop("change", None):
        change(state)
    name = f"{lm.config.model_type.title()}ForDiffusionLM"
    config = {**lm.config.to_diff_dict(), **FLAGS, "architectures": [name], **how.pop("flags", {})}
    return store(folder, {k: v for k, v in config.items() if v != "absent"}, state, **how)
