"""Laws of the noise of parametrizations."""

from __future__ import annotations

import torch

from l2d_framework.parametrization import ParametrizationConfig
from l2d_framework.simplex_state import dense
from l2d_framework.testing.assertions import ensure, ensure_close
from l2d_framework.testing.spaces import built_space, questions
from l2d_framework.testing.toys import toy_streams


@torch.no_grad()
def check_noise_is_standard_normal(config: ParametrizationConfig) -> None:
    """Noise is (B, L, D), standard normal, and independent within a token and between tokens."""
    space, _ = built_space(config)
    keys = torch.arange(3000).view(30, 100)
    noise = dense(space.noise(toy_streams(keys)))
    ensure(noise.shape == (*keys.shape, space.state_size), f"noise gave {tuple(noise.shape)}.")
    root = space.state_size**0.5
    for values, problem in (
        (noise, "is not standard normal"),
        (noise.mean(-1) * root, "of one token are not independent, by their means"),
        (noise.mean(1) * 10, "of different tokens are not independent, by their means"),
    ):
        slack = 5 / values.numel() ** 0.5
        mean, within = float(values.mean()), [float((values.abs() < bound).float().mean()) for bound in (0.5, 1, 2)]
        far = max(abs(found - share) for found, share in zip(within, (0.3829, 0.6827, 0.9545), strict=True))
        ensure(
            abs(mean) <= slack and far <= slack,
            f"The numbers of the noise {problem}: mean {mean:.3g}, shares below 0.5, 1 and 2 of {within}.",
        )


@torch.no_grad()
def check_noise_keeps_to_its_streams(config: ParametrizationConfig) -> None:
    """A token's noise comes from its own stream, is new at every call, and is the same alone and beside others."""
    space, _ = built_space(config)
    tokens, _, _ = questions()
    streams = toy_streams(tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = dense(space.noise(streams))
        ensure(torch.equal(torch.get_rng_state(), before), "noise draws from torch's global generator.")
    ensure(not torch.equal(dense(space.noise(streams)), first), "A second call gave the same noise.")
    alone = space.noise(toy_streams(tokens[1:, 1:2]))
    ensure_close(first[1:, 1:2], dense(alone), "a token's noise must not depend on its batch mates")
