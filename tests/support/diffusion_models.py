"""Diffusion language models of a few kilobytes whose diffusion path is felt."""

from functools import cache
from typing import Any

import torch
from tiny_models import tiny_lm, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from l2d_framework.backbone import Backbone, BackboneConfig
from l2d_framework.model import DiffusionLM, Origin
from l2d_framework.types import Query
from l2d_plugins.backbones.two_stream import TwoStreamConfig
from l2d_plugins.parametrizations.embedding import EmbeddingConfig
from l2d_plugins.schedules.linear import Linear

PROVEN = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "smollm3", "phi3", "olmo2")
"""Families that the two-stream backbone promises to serve."""

VARIANTS = ("lora", "full")

NETWORK: dict[str, Any] = {"rank": 2, "alpha": 2.0, "time_features": 8, "conditioning_size": 8}


def backbone_config(**fields: Any) -> TwoStreamConfig:
    """A small two-stream configuration with some fields replaced."""
    return TwoStreamConfig(**{**NETWORK, **fields})


def perturb(model: DiffusionLM | Backbone, *, seed: int = 0) -> None:
    """Move every own weight, since a fresh diffusion path changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    frozen = {id(parameter) for parameter in language_model(model).parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in frozen:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def language_model(model: DiffusionLM | Backbone) -> PreTrainedModel:
    """The frozen model inside."""
    return model.lm if isinstance(model, Backbone) else model.backbone.lm
