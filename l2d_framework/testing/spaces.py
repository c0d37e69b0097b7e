"""Questions put to parametrizations: a fresh state space with an embedding table, tokens, logits and times."""

from __future__ import annotations

import torch
from torch import Tensor

from l2d_framework.parametrization import Parametrization, ParametrizationConfig

VOCAB, HIDDEN = 29, 24
"""V and H; with fewer tokens than hidden units nothing would be worth remembering but logits."""


def built_space(config: ParametrizationConfig, seed: int = 0) -> tuple[Parametrization, Tensor]:
    """A state space in evaluation mode and an embedding table, (V, H)."""
    table = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(7))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build(VOCAB, HIDDEN).eval(), table


def questions() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, (2, 4), int64; logits, (2, 4, V), float32; times, (2, 4), float32."""
    generator = torch.Generator().manual_seed(8)
    tokens = torch.tensor([[0, 3, 5, 7], [11, 12, 1, 2]])
    return tokens, torch.randn(2, 4, VOCAB, generator=generator), torch.rand(2, 4, generator=generator)
