"""Diffusion over k-logit simplexes of the vocabulary, the state space of TESS 2 (arXiv:2502.13917, section 3.1)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from l2d_framework.noise import categorical
from l2d_framework.parametrization import Parametrization, ParametrizationConfig
from l2d_framework.schedule import Schedule
from l2d_framework.types import Random
from l2d_framework.wide import WideState, dense, pieces

_CANDIDATES = 256


class SimplexEstimate(BaseModel):
    """How logits become the clean simplex the solver moves towards.

    The paper takes the most likely token (Eq. 5); the authors' scripts draw from the nucleus of mass 0.99. `average` is
    the expected simplex, 2 k softmax - k.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    mode: Literal["argmax", "nucleus", "average"] = "argmax"
    top_p: float = Field(default=0.99, gt=0, le=1)
    """Mass of the nucleus; 1 draws from the whole vocabulary."""
    temperature: float = Field(default=1.0, gt=0)


class SimplexConfig(ParametrizationConfig):
    """A token is +k at its place in the vocabulary and -k elsewhere; the noise has standard deviation k.

    The network reads softmax(x) times the embedding table, averaged with its own previous prediction. The table gets no
    gradient from that product, as in the authors' code, only from known tokens.
    """

    default_preset: ClassVar[str | None] = "tess2"
    default_padding: ClassVar[str] = "target"
    default_block_size: ClassVar[int | None] = None

    name: Literal["simplex"] = "simplex"
    k: float = Field(default=5.0, gt=0)
    self_conditioning: Literal["mean", "sum", "max", "product", "none"] = "mean"
    """How the probabilities of state and previous prediction mix; `mean` is the paper's (Eq. 6 to 8)."""
    train_table: bool = False
    """Let gradients reach the embedding table through noisy positions, too."""
    estimate: SimplexEstimate = SimplexEstimate()

    def build(self, vocab_size: int, hidden_size: int) -> Simplex:
        """Make the module, which has no weights.

        Args:
            vocab_size: V, width of the state.
            hidden_size: H.

        Returns:
            The state space.
        """
        return Simplex(self, vocab_size)


class Simplex(Parametrization):
    """Module of `SimplexConfig`.

    Args:
        config: its configuration.
        vocab_size: V.
    """

    config: SimplexConfig

    def __init__(self, config: SimplexConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.state_size = vocab_size
        self.prior_scale = config.k
        self.uses_previous = config.self_conditioning != "none"

    def noise(self, random: Random) -> Tensor:
        """Standard normal noise, drawn from a seed per token when it is needed.

        Args:
            random: one stream per token.

        Returns:
            (B, L, V), float32, kept as seeds.
        """
        return WideState.normal(random.seeds(), self.state_size, random.device)

    def encode(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Simplexes of tokens.

        Args:
            tokens: ids, (B, L), int64.
            table: not used.

        Returns:
            (B, L, V), float32, kept as ids.

        Source: arXiv:2502.13917, Eq. 1.
        """
        return WideState.simplex(tokens, self.config.k, self.state_size)

    def embed(self, x: Tensor, t: Tensor, schedule: Schedule, table: Tensor, previous: Tensor | None) -> Tensor:
        """Network input: the expected embedding under the mixture of state and previous prediction.

        Args:
            x: (B, L, V), float32.
            t: not used; the time embedding is the backbone's.
            schedule: not used.
            table: embedding table, (V, H).
            previous: logits of the previous evaluation, (B, L, V), or its expected embeddings, (B, L, H).

        Returns:
            (B, L, H), type of `table`.

        Source: arXiv:2502.13917, Eq. 1 and 6 to 8.
        """
        with torch.set_grad_enabled(self.config.train_table and torch.is_grad_enabled()):
            rows, length, size = x.shape
            parts = [
                self._embed(x[:, part], table, None if previous is None else previous[:, part])
                for part in pieces(rows, length, size)
            ]
            return torch.cat(parts, 1)

    def _embed(self, x: Tensor, table: Tensor, previous: Tensor | None) -> Tensor:
        mix = self.config.self_conditioning
        now = dense(x).softmax(-1)
        if mix == "none":
            return now.to(table.dtype) @ table
        if previous is not None and previous.shape[-1] == self.state_size:
            return _mixed(now, previous.float().softmax(-1), mix).to(table.dtype) @ table
        if mix in ("mean", "sum"):
            before = table.mean(0) if previous is None else previous
            both = now.to(table.dtype) @ table + before.to(table.dtype)
            return 0.5 * both if mix == "mean" else both
        return _mixed(now, torch.full_like(now[..., :1], 1 / self.state_size), mix).to(table.dtype) @ table

    def remember(self, logits: Tensor, table: Tensor) -> Tensor:
        """Expected embeddings of a prediction, all that the mixtures linear in it need.

        Args:
            logits: (B, n, V), float32.
            table: embedding table, (V, H).

        Returns:
            (B, n, H); the logits themselves for other mixtures, or when they are no wider.
        """
        if self.config.self_conditioning not in ("mean", "sum") or self.state_size <= table.shape[1]:
            return logits
        return logits.softmax(-1).to(table.dtype) @ table

    def estimate(self, logits: Tensor, t: Tensor, codebook: Tensor, random: Random) -> Tensor:
        """Clean simplex to move towards.

        Args:
            logits: (B, L, V), float32.
            t: not used.
            codebook: not used.
            random: one number per token is drawn in mode `nucleus`.

        Returns:
            (B, L, V), float32.

        Source: arXiv:2502.13917, Eq. 5.
        """
        options = self.config.estimate
        if options.mode == "average":
            return 2 * self.config.k * (logits / options.temperature).softmax(-1) - self.config.k
        if options.mode == "argmax":
            tokens = logits.argmax(-1)
        else:
            tokens = _draw(logits / options.temperature, options.top_p, random.uniform())
        return WideState.simplex(tokens, self.config.k, self.state_size)


def _mixed(now: Tensor, before: Tensor, mix: str) -> Tensor:
    if mix == "mean":
        return now.add_(before).mul_(0.5) if not now.requires_grad else 0.5 * (now + before)
    if mix == "sum":
        return now + before
    return torch.maximum(now, before) if mix == "max" else now * before


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Which tokens the nucleus keeps: the likeliest, as long as the mass before them is below `top_p`.

    Args:
        logits: (..., V), float32, already divided by the temperature.
        top_p: mass, in (0, 1].

    Returns:
        (..., V), bool; the likeliest token is always kept.

    Source: Holtzman et al. 2020, arXiv:1904.09751.
    """
    _, inside, order = _likeliest(logits, top_p, logits.shape[-1])
    return torch.zeros_like(inside).scatter(-1, order, inside)


def _likeliest(logits: Tensor, top_p: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the `count` likeliest tokens in falling order: probability, whether the nucleus keeps them, and id."""
    total = logits.logsumexp(-1, keepdim=True)
    top, order = logits.topk(count, dim=-1)
    mass = (top - total).exp()
    return mass, (mass.cumsum(-1) - mass < top_p) | (top_p == 1), order


def _draw(logits: Tensor, top_p: float, u: Tensor) -> Tensor:
    """A token of the nucleus for each number `u`; the whole vocabulary is sorted only where the top does not reach."""
    if top_p == 1:
        return categorical(logits.softmax(-1), u)
    size = logits.shape[-1]
    count = min(_CANDIDATES, size)
    mass, inside, order = _likeliest(logits, top_p, count)
    tokens = order.gather(-1, categorical(mass * inside, u)[..., None]).squeeze(-1)
    short = inside[..., -1] & (count < size)
    if bool(short.any()):
        mass, inside, order = _likeliest(logits[short], top_p, size)
        tokens[short] = order.gather(-1, categorical(mass * inside, u[short])[..., None]).squeeze(-1)
    return tokens
