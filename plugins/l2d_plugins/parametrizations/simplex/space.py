"""Diffusion over k-logit simplexes of the vocabulary, the state space of TESS 2 (arXiv:2502.13917, section 3.1)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from typing_extensions import override

from l2d_framework.diffusion.logits import cached_pieces, pieces, top_token
from l2d_framework.diffusion.rng import categorical
from l2d_framework.parametrization import Parametrization, ParametrizationConfig
from l2d_framework.schedule import NoiseLaw
from l2d_framework.types import Random
from l2d_plugins.parametrizations.simplex.fused import fused_embedding
from l2d_plugins.parametrizations.simplex.state import WideState

_LINEAR = "mean", "sum", "none"
_CANDIDATES = 256
_MARGIN = 1e-5


class SimplexEstimate(BaseModel):
    """How logits become the clean simplex the solver moves towards.

    The paper takes the most likely token (Eq. 5); the authors' scripts draw from the nucleus of mass 0.99. `average` is
    the expected simplex, 2 k softmax - k.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    mode: Literal["argmax", "nucleus", "average"] = "argmax"
    """The most likely token, one drawn from the nucleus, or the expected simplex. `nucleus` for variety, as the
    authors' scripts; `argmax` for the same answer every time."""
    top_p: float = Field(default=0.99, gt=0, le=1)
    """Mass of the nucleus; 1 draws from the whole vocabulary."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits before a draw or a mean; below 1 sharper. Without effect on `argmax`."""


class SimplexConfig(ParametrizationConfig):
    """A token is +k at its place in the vocabulary and -k elsewhere; the noise has standard deviation k.

    The network reads softmax(x) times the embedding table, averaged with its own previous prediction. The table gets no
    gradient from that product, as in the authors' code, only from known tokens.
    """

    default_method: ClassVar[str | None] = "tess"

    name: Literal["simplex"] = "simplex"
    k: float = Field(default=5.0, gt=0)
    """Height of a simplex, in the units of its coordinates; the authors' 5. A checkpoint needs the value it was trained
    with."""
    self_conditioning: Literal["mean", "sum", "max", "product", "none"] = "mean"
    """How the probabilities of state and previous prediction mix; `mean` is the paper's (Eq. 6 to 8)."""
    train_table: bool = False
    """Let gradients reach the embedding table through noisy positions, too."""
    estimate: SimplexEstimate = SimplexEstimate()
    """How logits become the clean state that a solver moves towards; `sampling.estimate` changes it for one request."""

    @override
    def build(self, vocab_size: int, hidden_size: int) -> Simplex:
        return Simplex(self, vocab_size)


class Simplex(Parametrization):
    """Module of `SimplexConfig`."""

    config: SimplexConfig

    def __init__(self, config: SimplexConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.state_size = vocab_size
        self.prior_scale = config.k
        self.uses_previous = config.self_conditioning != "none"

    @override
    def noise(self, random: Random) -> Tensor:
        """Standard normal noise, kept as a seed per token."""
        return WideState.normal(random.seeds(), self.state_size, random.device)

    @override
    def encode(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Simplexes of tokens, kept as ids.

        Source: arXiv:2502.13917, Eq. 1.
        """
        return WideState.simplex(tokens, self.config.k, self.state_size)

    @override
    def embed(self, x: Tensor, t: Tensor, schedule: NoiseLaw, table: Tensor, previous: Tensor | None) -> Tensor:
        """Expected embedding under the mixture of state and previous prediction; the time is the backbone's affair.

        Source: arXiv:2502.13917, Eq. 1 and 6 to 8.
        """
        with torch.set_grad_enabled(self.config.train_table and torch.is_grad_enabled()):
            return expected_embedding(x, table, previous, self.config.self_conditioning)

    @override
    def remember(self, logits: Tensor, table: Tensor) -> Tensor:
        """Expected embeddings where the mixture is linear in a prediction and they are narrower, else the logits."""
        if self.config.self_conditioning not in ("mean", "sum") or self.state_size <= table.shape[1]:
            return logits
        return logits.softmax(-1).to(table.dtype) @ table

    @override
    def estimate(self, logits: Tensor, t: Tensor, codebook: Tensor, random: Random) -> Tensor:
        """Clean simplex to move towards; mode `nucleus` draws two numbers per token, one if it is the vocabulary.

        Source: arXiv:2502.13917, Eq. 5.
        """
        options = self.config.estimate
        if options.mode == "average":
            return 2 * self.config.k * _cooled(logits, options).softmax(-1) - self.config.k
        tokens = top_token(logits) if options.mode == "argmax" else _draw(logits, options, random)
        return WideState.simplex(tokens, self.config.k, self.state_size)


def expected_embedding(x: Tensor, table: Tensor, previous: Tensor | None = None, mix: str = "none") -> Tensor:
    """Embeddings expected under softmax(x) mixed with a previous prediction, (B, L, H), in `table`'s type.

    All that a network reads of a state goes through here, and of one kept as tokens and seeds no other function needs
    the numbers. They are made a few positions at a time, or on the fly where a kernel can do that.

    Args:
        x: states, (B, L, V); a `WideState` or dense.
        table: embeddings, (V, H).
        previous: what `Simplex.remember` made of a prediction, its logits (B, L, V) or embeddings (B, L, H); None for
            the uniform prediction.
        mix: as in `SimplexConfig.self_conditioning`.

    Returns:
        The embeddings.
    """
    rows, length, size = x.shape
    now = fused_embedding(x, table) if mix in _LINEAR else None
    parts = []
    for part in pieces(rows, length, size):
        before = None if previous is None else previous[:, part]
        if now is None:
            parts.append(_expected(x[:, part], table, before, mix))
        else:
            parts.append(_beside(now[:, part], table, before, mix))
    return torch.cat(parts, 1)


def _expected(x: Tensor, table: Tensor, previous: Tensor | None, mix: str) -> Tensor:
    now = x.softmax(-1)
    if previous is not None and previous.shape[-1] == x.shape[-1] and mix != "none":
        both = _mixed(now, previous, mix).to(table.dtype) @ table
    elif mix in _LINEAR:
        return _beside(now.to(table.dtype) @ table, table, previous, mix)
    else:
        both = _mixed(now, now.new_zeros(1, 1, 1).expand(now.shape), mix).to(table.dtype) @ table
    return 0.5 * both if mix == "mean" else both


def _beside(now: Tensor, table: Tensor, previous: Tensor | None, mix: str) -> Tensor:
    """What `_expected` returns of a state whose expected embeddings alone, (B, L, H), are known."""
    if mix == "none":
        return now
    if previous is None:
        before = table.mean(0)
    elif previous.shape[-1] == len(table):
        before = previous.float().softmax(-1).to(table.dtype) @ table
    else:
        before = previous.to(table.dtype)
    return 0.5 * (now + before) if mix == "mean" else now + before


def _mixed(now: Tensor, previous: Tensor, mix: str) -> Tensor:
    """Mixture of the probabilities `now`, which may be overwritten, and those of previous logits; a mean not halved."""
    join: Any = torch.maximum if mix == "max" else torch.mul if mix == "product" else torch.add
    if now.requires_grad or previous.requires_grad:
        return join(now, previous.float().softmax(-1))  # type: ignore[no-any-return]
    for part in cached_pieces(now):
        join(now[:, part], previous[:, part].float().softmax(-1), out=now[:, part])
    return now


def likeliest(logits: Tensor, top_p: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the `count` likeliest tokens in falling order: probability, whether the nucleus keeps them, and id.

    The nucleus keeps tokens as long as the mass before them is below `top_p`, so always the first (arXiv:1904.09751).
    """
    total = logits.logsumexp(-1, keepdim=True)
    top, order = logits.topk(count, dim=-1)
    mass = (top - total).exp()
    return mass, (mass.cumsum(-1) - mass < top_p) | (top_p == 1), order


def _draw(logits: Tensor, options: SimplexEstimate, random: Random) -> Tensor:
    """A token of the nucleus, without sorting wherever one drawn from the whole vocabulary lies well inside.

    To draw from the whole and, if that is outside, from the nucleus, is to draw from the nucleus.
    """
    top_p, u = options.top_p, random.uniform()
    proposals = [_propose(_cooled(logits[:, part], options), u[:, part]) for part in cached_pieces(logits)]
    tokens, mass = (torch.cat(parts, 1) for parts in zip(*proposals, strict=True))
    if top_p == 1:
        return tokens
    again = random.uniform()
    # A margin for rounding and for tokens as likely as this one, which may come before or after it.
    unsure = mass > top_p - _MARGIN
    if bool(unsure.any()):
        tokens[unsure] = _settled(_cooled(logits[unsure], options), top_p, tokens[unsure], again[unsure])
    return tokens


def _cooled(logits: Tensor, options: SimplexEstimate) -> Tensor:
    return logits if options.temperature == 1 else logits / options.temperature


def _propose(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A token of the whole vocabulary for each number `u`, and the mass of the others that are at least as likely."""
    mass = logits.softmax(-1)
    tokens = categorical(mass, u)
    own = mass.gather(-1, tokens[..., None])
    # Zeros and ones as numbers, since choosing by truth values is several times slower on a CPU.
    at_least = torch.ge(mass, own, out=torch.empty_like(mass))
    return tokens, at_least.mul_(mass).sum(-1) - own[..., 0]


def _settled(logits: Tensor, top_p: float, tokens: Tensor, u: Tensor, candidates: int = _CANDIDATES) -> Tensor:
    """The tokens, (N,), where the nucleus has them, else one of it for each number `u`.

    The whole vocabulary is sorted only where its likeliest tokens do not fill the nucleus.
    """
    size = logits.shape[-1]
    count = min(candidates, size)
    mass, inside, order = likeliest(logits, top_p, count)
    drawn = order.gather(-1, categorical(mass * inside, u)[..., None]).squeeze(-1)
    kept = ((order == tokens[..., None]) & inside).any(-1)
    settled = torch.where(kept, tokens, drawn)
    short = inside[..., -1] & (count < size)
    if bool(short.any()):
        settled[short] = _settled(logits[short], top_p, tokens[short], u[short], size)
    return settled
