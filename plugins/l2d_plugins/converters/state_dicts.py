"""Folders in transformers' layout, whatever code base wrote them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from l2d_framework.errors import CheckpointError

_LAYOUTS = ("model.safetensors", "pytorch_model.bin")


def read_config(folder: Path) -> dict[str, Any]:
    """Fields of the `config.json` of a model."""
    config = _read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{str(folder / 'config.json')!r} names no model_type. Download the checkpoint again.")
    return config


def read_state(folder: Path) -> dict[str, Tensor]:
    """A model's weights from one file or shards with an index, safetensors, read at first use, before pickles."""
    for name in _LAYOUTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index)
        if (folder / name).is_file():
            return _read_file(folder / name)
    raise CheckpointError(f"{str(folder)!r} holds no {' or '.join(_LAYOUTS)}, nor shards of one. Download it again.")


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{str(index)!r} is damaged: it maps no weights to files. Download it again.")
    shards = {name: folder / Path(name).name for name in sorted(set(places.values()))}
    absent = [name for name, path in shards.items() if not path.is_file()]
    if absent:
        raise CheckpointError(f"{str(folder)!r} lacks {len(absent)} shards, such as {absent[0]!r}. Download it again.")
    parts = {name: _read_file(path) for name, path in shards.items()}
    lacking = [key for key, shard in places.items() if key not in parts[shard]]
    if lacking:
        raise CheckpointError(
            f"{str(shards[places[lacking[0]]])!r} lacks {lacking[0]!r}, which the index promises. Download it again."
        )
    return {key: value for part in parts.values() for key, value in part.items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged or holds more than weights ({error}). Download it again."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{str(path)!r} holds no named weights. Give a model, not a state of its training.")
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is missing or damaged ({error}). Download it again.") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{str(path)!r} is damaged: it holds no fields. Download it again.")
    return fields
