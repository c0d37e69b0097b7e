"""Questions put to backbones: random layouts, noisy states, and fresh networks whose every part has an effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from l2d_framework.backbone import Backbone, BackboneConfig
from l2d_framework.errors import ConfigError
from l2d_framework.testing.models import HIDDEN_SIZE, tiny_llama
from l2d_framework.types import Layout

ROWS, LENGTH, KNOWN = 2, 8, 4
"""Rows and tokens of a layout, and how many of its tokens are known from the start."""


@dataclass(frozen=True)
class Scene:
    """The same places of every row of a layout, with noisy states and times.

    Attributes:
        layout: tokens and blocks, (B, S).
        places: L slots asked about.
    """

    layout: Layout
    places: list[int]

    @property
    def positions(self) -> Tensor:
        """Slots asked about, (B, L), int64."""
        return torch.tensor([self.places] * len(self.layout.tokens))

    @property
    def h(self) -> Tensor:
        """Embedded noisy states, (B, L, H)."""
        return torch.randn(*self.positions.shape, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5))

    @property
    def t(self) -> Tensor:
        """Times halfway, (B, L)."""
        return torch.full(self.positions.shape, 0.5)

    def ask(self, backbone: Backbone, *, context: Any = None, shared_time: float | None = None, **other: Any) -> Tensor:
        """Features about the places, (B, L, H); the layout is read where no context is given."""
        context = backbone.read(other.get("layout", self.layout)) if context is None else context
        h, t = other.get("h", self.h), other.get("t", self.t)
        return backbone.features(h, t, self.positions, context, other.get("condition"), shared_time=shared_time)


def noisy_scenes(backbone: Backbone) -> Iterator[tuple[int | None, Scene]]:
    """Scenes of every block size that a backbone serves, set to each in turn.

    Args:
        backbone: any backbone.

    Yields:
        The block size and its scene.
    """
    for size in block_sizes(backbone.config):
        backbone.in_blocks(size)
        yield size, noisy_scene(size)


def noisy_scene(block_size: int | None) -> Scene:
    """Known tokens first, then blocks that are all asked about; a single block for None."""
    layout = known_layout()
    noisy = torch.arange(LENGTH - KNOWN)
    blocks = layout.blocks.clone()
    blocks[:, KNOWN:] = 1 + noisy // (block_size or len(noisy))
    return Scene(Layout(layout.tokens, blocks), list(range(KNOWN, LENGTH)))


def known_layout(padding: int = 0) -> Layout:
    """Random tokens, all known."""
    tokens = torch.randint(3, 30, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    blocks = torch.zeros_like(tokens)
    blocks[1, :padding] = -1
    return Layout(tokens, blocks)


def block_sizes(config: BackboneConfig) -> list[int | None]:
    """Block sizes out of 1, 2 and None that a backbone serves."""
    lm_config = tiny_llama().config
    return [size for size in (1, 2, None) if _serves(config, lm_config, size)]


def _serves(config: BackboneConfig, lm_config: Any, block_size: int | None) -> bool:
    try:
        config.check(lm_config, block_size)
    except ConfigError:
        return False
    return True


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
