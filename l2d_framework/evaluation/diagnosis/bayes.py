"""The exact likelihood of a noisy state under every token, and Bayes' rule with a prior over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.logits import dense, pieces
from l2d_framework.errors import ConfigError
from l2d_framework.parametrization import Parametrization


class TokenLikelihood:
    """log N(x_t; alpha(t) clean(y), (sigma(t) prior_scale)^2 I) for every token y, up to a number all tokens share.

    The law holds for every schedule and for every parametrization with the corruption that
    `Parametrization.corrupt` has by default, x_t = alpha(t) clean + sigma(t) prior_scale noise. The model's weights
    must not change while this is used.
    """

    @torch.no_grad()
    def __init__(self, diffusion: Diffusion) -> None:
        space, table = diffusion.parametrization, diffusion.backbone.table()
        if (type(space).corrupt, type(space).prior) != (Parametrization.corrupt, Parametrization.prior):
            raise ConfigError(
                f"Parametrization {space.config.component_name()!r} corrupts tokens in a way of its own, for which the "
                "likelihood of a noisy state is not known here. Diagnose models with Gaussian noise."
            )
        tokens = torch.arange(diffusion.backbone.vocab_size, device=table.device)[None]
        # States as wide as the vocabulary stay symbolic until a piece is used.
        parts = pieces(1, tokens.shape[1], space.state_size)
        self._clean = [space.encode(tokens[:, part], table) for part in parts]
        self._first = dense(self._clean[0][:, :1])
        self._schedule, self._scale = diffusion.schedule, space.prior_scale

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Logarithms of the likelihood of states (B, L, D), less that of token 0, (B, L, V), float32; sigma(t) > 0.

        With move(y) = clean(y) - clean(0) the difference of the two squared distances is linear in x:
        (alpha x . move(y) - alpha^2 (|clean(y)|^2 - |clean(0)|^2) / 2) / (sigma prior_scale)^2. Components that all
        tokens share, whose sum would swamp the rest in float32, drop out.
        """
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = float(self._schedule.alpha(time)), float(self._schedule.sigma(time)) * self._scale
        state, logarithms = dense(x), []
        for part in self._clean:
            clean = dense(part)
            move = (clean - self._first)[0]
            rise = (move * (clean + self._first)[0]).sum(-1) / 2
            logarithms.append((alpha * (state @ move.T) - alpha**2 * rise) / sigma**2)
        return torch.cat(logarithms, -1)
