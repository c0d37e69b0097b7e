"""Logits: the likeliest token, found in groups where that is faster."""

import pytest
import torch

from l2d_framework.diffusion.logits import top_token


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000, 1280])
@pytest.mark.parametrize("kind", ["random", "tied", "equal", "infinite", "undefined", "rounded"])
def test_the_top_token_is_what_argmax_finds(size, kind):
    logits = torch.randn(3, 50, size, generator=torch.Generator().manual_seed(size))
    if kind == "tied":
        logits = logits.round()
    elif kind == "equal":
        logits.zero_()
    elif kind == "infinite":
        logits = torch.where(logits > 0.5, torch.inf, -torch.inf)
    elif kind == "undefined":
        logits[logits > 2] = torch.nan
    elif kind == "rounded":
        logits = logits.bfloat16()
    assert torch.equal(top_token(logits), logits.argmax(-1))
    assert torch.equal(top_token(logits.transpose(0, 1)), logits.argmax(-1).T)
