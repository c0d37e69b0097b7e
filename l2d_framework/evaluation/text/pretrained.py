"""Models that judge text: what can be checked without their weights, and the weights when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModel, AutoModelForCausalLM

from l2d_framework import opening
from l2d_framework.base_model import fetch, load_tokenizer
from l2d_framework.errors import CheckpointError, ConfigError
from l2d_framework.models.manifest import MANIFEST, base_reference, read_manifest
from l2d_framework.opening import open_config, open_model

Track = Callable[[Sequence[int], str], Iterable[int]]
"""Passes batches through and shows how far they are; gets the batches and a title."""


@dataclass
class Pretrained:
    """A model, its weights loaded when first used.

    Attributes:
        name: path or hub id, as given.
        config: transformers config.
        tokenizer: its tokenizer.
        load: makes the model, in evaluation mode, where it is to run.
    """

    name: str
    config: Any
    tokenizer: Any
    load: Callable[[], Any]

    @cached_property
    def model(self) -> Any:
        """The model."""
        return self.load()

    def limit(self, wanted: int | None) -> int | None:
        """Longest text, in tokens, that the model's positions and the user allow; None for no limit."""
        own = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return min((limit for limit in (wanted, own) if limit is not None), default=None)

    def encode(self, text: str, **options: Any) -> tuple[int, ...]:
        """Token ids of a text."""
        ids = tuple(self.tokenizer(text, verbose=False, **options)["input_ids"])
        known = self.config.get_text_config().vocab_size
        if max(ids, default=0) >= known:
            raise ConfigError(
                f"The tokenizer of {self.name!r} gave token {max(ids)} for {text[:40]!r}, but the model has only "
                f"{known:,} tokens. Name a model whose files belong together."
            )
        return ids


def pretrained(path: str, *, causal: bool, device: str, dtype: str) -> Pretrained:
    """A model from a folder or the hub, checked without its weights; `causal`: next tokens are wanted, too."""
    folder = fetch(path)
    if (folder / MANIFEST).is_file():
        raise ConfigError(f"{path!r} is a diffusion model, which judges no texts. Name a plain language model.")
    config: Any = open_config(folder)
    auto, known = (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING) if causal else (AutoModel, MODEL_MAPPING)
    if type(config) not in known:
        kind = "causal language model" if causal else "model with hidden states"
        raise ConfigError(f"{path!r} is a {config.model_type!r}, which transformers knows as no {kind}. Name another.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ConfigError(f"{str(folder)!r} holds no *.safetensors or *.bin weights. Name another model.")
    tokenizer = open_tokenizer(path)
    size = config.get_text_config().vocab_size
    # Tokens added to a tokenizer may lie beyond a model that never meets them.
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"The tokenizer of {path!r} has {tokenizer.vocab_size:,} tokens and the model {size:,}. They do not "
            "belong together; name another folder."
        )

    def load() -> Any:
        model: Any
        model, report = open_model(auto, folder, dtype=dtype)
        if causal and report["missing_keys"]:
            raise ConfigError(
                f"{path!r} lacks the weights {sorted(report['missing_keys'])[:3]}, which would be random. Name another."
            )
        return model.eval().to(device)

    return Pretrained(path, config, tokenizer, load)


def open_tokenizer(path: str) -> Any:
    """Tokenizer of a language model, or of an l2d-framework checkpoint's base model."""
    found: Any = None
    try:
        if (Path(path) / MANIFEST).is_file():
            found = load_tokenizer(base_reference(path, read_manifest(path)))
        elif Path(path).is_dir() or path.count("/") < 2:
            found = opening.open_tokenizer(path)
    except CheckpointError as error:
        raise ConfigError(
            f"No tokenizer can be read from {path!r} ({str(error).partition(chr(10))[0]}). Name the folder or hub id "
            "of a language model."
        ) from error
    if found is None or not len(found):
        raise ConfigError(f"There is no tokenizer in {path!r}. Name the folder or hub id of a language model.")
    return found


def pad_right(batch: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Network input for texts of different lengths; what is padded is masked."""
    width = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
    return {"input_ids": ids, "attention_mask": mask}
