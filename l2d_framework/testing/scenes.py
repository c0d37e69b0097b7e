"""Questions put to backbones: a tiny language model, random layouts, noisy states, networks whose parts all act."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from l2d_framework.backbone import Backbone, BackboneConfig
from l2d_framework.errors import ConfigError
from l2d_framework.types import Layout

ROWS, LENGTH, KNOWN = 2, 8, 4
"""Rows and tokens of a layout, and how many of its tokens are known from the start."""
_HIDDEN_SIZE = 32


def tiny_llama(seed: int = 0, *, vocab_size: int = 37, layers: int = 2) -> PreTrainedModel:
    """Random Llama of width 32 with grouped keys, its weights large enough that every token matters to every later one.

    Args:
        seed: of the weights.
        vocab_size: V.
        layers: number of decoder layers.

    Returns:
        A float32 model on the CPU, in evaluation mode, that takes up to 128 tokens.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm: PreTrainedModel = LlamaForCausalLM(_llama_config(vocab_size, layers))
    lm.eval()
    return lm


def _llama_config(vocab_size: int = 37, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=_HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@dataclass(frozen=True)
class Scene:
    """The same L places of every row of a layout, with noisy states and times."""

    layout: Layout
    places: list[int]

    @property
    def positions(self) -> Tensor:
        """Slots asked about, (B, L), int64."""
        return torch.tensor([self.places] * len(self.layout.tokens))

    @property
    def h(self) -> Tensor:
        """Embedded noisy states, (B, L, H)."""
        return torch.randn(*self.positions.shape, _HIDDEN_SIZE, generator=torch.Generator().manual_seed(5))

    @property
    def t(self) -> Tensor:
        """Times halfway, (B, L)."""
        return torch.full(self.positions.shape, 0.5)

    def ask(self, backbone: Backbone, *, context: Any = None, **other: Any) -> Tensor:
        """Features about the places, (B, L, H); the layout is read where no context is given."""
        context = backbone.read(other.pop("layout", self.layout)) if context is None else context
        asked = {"h": self.h, "t": self.t, "condition": None, **other}
        h, t, condition = (asked.pop(name) for name in ("h", "t", "condition"))
        return backbone.features(h, t, self.positions, context, condition, **asked)


def noisy_scenes(
    config: BackboneConfig, lm: PreTrainedModel | None = None
) -> Iterator[tuple[int | None, Backbone, Scene]]:
    """Every block size that is served, set in turn: known tokens first, then blocks that are all asked about."""
    backbone = built(config, lm)
    for size in block_sizes(config):
        backbone.in_blocks(size)
        layout, noisy = known_layout(), torch.arange(LENGTH - KNOWN)
        layout.blocks[:, KNOWN:] = 1 + noisy // (size or len(noisy))
        yield size, backbone, Scene(layout, list(range(KNOWN, LENGTH)))


def known_layout(padding: int = 0) -> Layout:
    """Random tokens, all known but the padding of the second row."""
    tokens = torch.randint(3, 30, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    blocks = torch.zeros_like(tokens)
    blocks[1, :padding] = -1
    return Layout(tokens, blocks)


def block_sizes(config: BackboneConfig) -> list[int | None]:
    """Block sizes out of 1, 2 and None that a backbone serves."""
    lm_config, served = _llama_config(), []
    for size in (1, 2, None):
        try:
            config.check(lm_config, size)
        except ConfigError:
            continue
        served.append(size)
    return served


@torch.no_grad()
def built(config: BackboneConfig, lm: PreTrainedModel | None = None) -> Backbone:
    """A backbone in evaluation mode, its own weights perturbed, since fresh ones may leave the model as it was."""
    lm = tiny_llama() if lm is None else lm
    inherited = {id(weight) for weight in lm.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        backbone = config.build(lm).eval()
        for weight in backbone.parameters():
            if id(weight) not in inherited:
                weight.add_(0.1 * torch.randn_like(weight))
    return backbone
