"""What a reward model is shown of a pair, as guidance shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l2d_framework.config import RewardRun, SimplexNoise


def as_guided(
    inputs: dict[str, Any], run: RewardRun, model: Any, generator: Callable[[], torch.Generator]
) -> dict[str, Any]:
    """Where pairs are padded to a length, padding in full sight and, as transformers does for embeddings, read there.

    Args:
        inputs: `input_ids` and `attention_mask` of the chosen and then the rejected texts, (2 B, S), and perhaps more.
        run: says how long texts are and what noise they are shown under.
        model: the reward model; noise is for one that is in training.
        generator: makes the random numbers of a batch.

    Returns:
        The inputs of the model.
    """
    if run.data.pad_to is None:
        return inputs
    embed = model.get_input_embeddings()
    out = {name: value for name, value in inputs.items() if name != "input_ids"}
    out["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    if run.noise is not None and model.training:
        noisy = noisy_embeddings(inputs["input_ids"], embed.weight, run.noise, generator=generator())
        return out | {"inputs_embeds": noisy}
    return out | {"inputs_embeds": embed(inputs["input_ids"])}


def noisy_embeddings(ids: Tensor, embedding: Tensor, noise: SimplexNoise, *, generator: torch.Generator) -> Tensor:
    """Mean embeddings under the noisy simplexes of true tokens, both sides of a pair at the same time.

    x = alpha(t) * S + sigma(t) * k * z, where S is k at the true token and -k elsewhere; the result is softmax(x) E.

    Source: TESS 2, arXiv:2502.13917, Eq. 1 and 2.
    """
    u = torch.rand(len(ids) // 2, generator=generator, device=ids.device).repeat(2)
    schedule = noise.schedule.build()
    t = schedule.sample_times(u)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    rows = []
    for row, a, s in zip(ids, alpha, sigma, strict=True):
        draw = torch.randn(len(row), len(embedding), generator=generator, device=ids.device)
        # A softmax is blind to a constant, so only the true token's lead of 2k is left of S.
        x = noise.k * s * draw
        x[torch.arange(len(row), device=ids.device), row] += 2 * noise.k * a
        rows.append(x.softmax(-1).to(embedding.dtype) @ embedding)
    return torch.stack(rows)
