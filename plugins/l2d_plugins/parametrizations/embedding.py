"""Diffusion over normalised projected token embeddings, the state space of L2D (arXiv:2501.15781, section 3)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from l2d_framework.diffusion.rng import categorical
from l2d_framework.parametrization import Parametrization, ParametrizationConfig
from l2d_framework.schedule import NoiseLaw
from l2d_framework.types import Random, Stride

_TINY = 1e-30
_SHARPEST = 1e-4
_ROWS = 16384


class ConstantTemperature(BaseModel):
    """The same temperature at every evaluation; 0 takes the most likely token."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: Literal["constant"] = "constant"
    value: float = Field(default=1.0, ge=0)
    """Temperature of the estimate's distribution, no unit; below 1 sharper, 0 the most likely token."""

    def __call__(self, t: Tensor) -> Tensor:
        """Temperature at time t."""
        return torch.full_like(t, self.value)


class PolynomialTemperature(BaseModel):
    """(1 - t / end)^power before `end`, 0 from there on; power 1 and end 1 anneal linearly to the most likely token.

    Source: authors' option `polynomial_p_e`; the linear case is the paper's (arXiv:2501.15781, section 3.3).
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: Literal["polynomial"] = "polynomial"
    power: float = Field(default=1.0, gt=0)
    """How fast it falls: above 1 early, below 1 late."""
    end: float = Field(default=1.0, gt=0, le=1)
    """Time, in (0, 1], from which on the most likely token is taken; lower it for estimates that settle earlier."""

    def __call__(self, t: Tensor) -> Tensor:
        """Temperature at time t."""
        return (1 - t / self.end).clamp_min(0) ** self.power


Temperature = Annotated[ConstantTemperature | PolynomialTemperature, Field(discriminator="name")]


class EmbeddingEstimate(BaseModel):
    """How logits become the clean state the solver moves towards.

    The paper samples a token at an annealed temperature; the released code takes the argmax except for coding tasks. At
    temperature 0 the three modes coincide. `average` is the probability-weighted mean of CDCD (arXiv:2211.15089).
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    mode: Literal["sample", "argmax", "average"] = "sample"
    """A token drawn at `temperature`, the most likely one, or the mean of all weighted by their probabilities. Draws
    give variety, the most likely token fits tasks with one right answer."""
    temperature: Temperature = PolynomialTemperature()
    """Temperature of the draw, or of the weights of a mean, over t; without effect where the most likely token is
    taken."""
    renormalize: bool = False
    """Scale an average back to the norm sqrt(D) of a token."""
    lookahead: Literal["released", "paper"] = "released"
    """Time whose temperature is taken: one interval of the solver's grid ahead of the evaluation, half of one for a
    method of two stages that never evaluates the end (midpoint), as in the released code; or that of the evaluation
    itself. They are the same for adaptive solvers."""


class EmbeddingConfig(ParametrizationConfig):
    """Tokens are sqrt(D) * normalize(W e + b) of their input embedding e.

    The noise has standard deviation `prior_scale`. The projection keeps the bias of the released code, which the
    paper's parameter counts include.
    """

    default_method: ClassVar[str | None] = "l2d"

    name: Literal["embedding"] = "embedding"
    size: int = Field(default=256, gt=0)
    """D, width of the diffused state; the map from the state to the language model grows with it."""
    hidden: int = Field(default=256, gt=0)
    """Inner width of the map from the state to the language model."""
    prior_scale: float = Field(default=64.0, gt=0)
    """Sigma of the paper; the signal-to-noise ratio of a state is t sqrt(D) / ((1 - t) sigma)."""
    self_conditioning: Literal["none", "add"] = "none"
    """Whether the network also reads the embedding that its previous prediction expects, projected like a token and
    added through a linear map that starts at zero. `training.self_conditioning` is the share of examples that show it.

    Source: LangFlow, arXiv:2604.11748; Chen et al. 2022, arXiv:2208.04202."""
    bayes_skip: bool = False
    """Whether the log-likelihood of the state under each token is added to the logits, which Bayes' rule does with a
    prediction from everything but the state, so that the network only learns the rest.

    Source: LangFlow, arXiv:2604.11748."""
    estimate: EmbeddingEstimate = EmbeddingEstimate()
    """How logits become the clean state that a solver moves towards; `sampling.estimate` changes it for one request."""

    @override
    def build(self, vocab_size: int, hidden_size: int) -> Embedding:
        return Embedding(self, hidden_size)


class Embedding(Parametrization):
    """Module of `EmbeddingConfig`."""

    # Late slopes multiply rounding by 1 / (1 - t), and the state is small; the authors' code keeps it in float64 too.
    state_dtype: ClassVar[torch.dtype] = torch.float64

    config: EmbeddingConfig

    def __init__(self, config: EmbeddingConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.state_size = config.size
        self.prior_scale = config.prior_scale
        self.vocabulary = nn.Linear(hidden_size, config.size)
        self.translation = nn.Sequential(
            nn.Linear(config.size, config.hidden), nn.SiLU(), nn.Linear(config.hidden, hidden_size)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.uses_previous = config.self_conditioning != "none"
        if self.uses_previous:
            self.previous = nn.Parameter(torch.zeros(hidden_size, config.size))

    @override
    def encode(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Vectors of norm sqrt(D); gradients reach the projection."""
        return self._project(table[tokens])

    @override
    def codebook(self, table: Tensor) -> Tensor:
        # In pieces, since the table of a large model need not fit a second time in float32.
        return torch.cat([self._project(rows) for rows in table.split(_ROWS)])

    def _project(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            mapped = functional.linear(rows.float(), self.vocabulary.weight.float(), self.vocabulary.bias.float())
            return math.sqrt(self.state_size) * functional.normalize(mapped, dim=-1)

    @override
    def embed(self, x: Tensor, t: Tensor, schedule: NoiseLaw, table: Tensor, previous: Tensor | None) -> Tensor:
        """Network input: the state at unit variance, translated to the language model's width.

        The variance per component is sigma(t)^2 prior_scale^2 + alpha(t)^2, since tokens have norm sqrt(D).
        """
        variance = (schedule.sigma(t) * self.prior_scale) ** 2 + schedule.alpha(t) ** 2
        y = x / variance.sqrt()[..., None]
        h: Tensor = self.translation(y.to(self.vocabulary.weight.dtype))
        if not self.uses_previous:
            return h
        if previous is None:
            expected = table.mean(0)
        else:
            expected = _expected(previous, table) if previous.shape[-1] == len(table) else previous
        return h + functional.linear(self._project(expected).to(h.dtype), self.previous)

    @property
    @override
    def refines(self) -> bool:
        return self.config.bayes_skip

    @override
    def refine(self, logits: Tensor, x: Tensor, t: Tensor, schedule: NoiseLaw, codebook: Tensor) -> Tensor:
        if not self.refines:
            return logits
        # log N(x; alpha e, variance) of embeddings e, all of which have the same norm.
        variance = ((schedule.sigma(t) * self.prior_scale) ** 2).clamp_min(_SHARPEST)
        scaled = x * (schedule.alpha(t) / variance)[..., None]
        with torch.autocast(x.device.type, enabled=False):
            return logits + functional.linear(scaled.float(), codebook)

    @override
    def remember(self, logits: Tensor, table: Tensor) -> Tensor:
        # Nothing as wide as logits may be anything else.
        return logits if len(table) <= table.shape[1] else _expected(logits, table)

    @override
    def lookahead(self, t: Tensor, stride: Stride) -> Tensor:
        if self.config.estimate.lookahead == "paper":
            return t
        # The released code says it by name: half an interval for `midpoint`, one for its other fixed-step methods.
        moves = 2 if stride.stages == 2 and not stride.evaluates_end else 1
        return (t + stride.length / moves).clamp_max(1.0)

    @override
    def estimate(self, logits: Tensor, t: Tensor, codebook: Tensor, random: Random) -> Tensor:
        options = self.config.estimate
        if options.mode == "argmax" or options.temperature == ConstantTemperature(value=0.0):
            return codebook[logits.argmax(-1)]
        temperature = options.temperature(t).clamp_min(_TINY)[..., None]
        weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        if options.mode == "sample":
            return codebook[categorical(weights, random.uniform())]
        average = weights @ codebook
        if options.renormalize:
            average = math.sqrt(self.state_size) * functional.normalize(average, dim=-1)
        return average


def _expected(logits: Tensor, table: Tensor) -> Tensor:
    return logits.softmax(-1).to(table.dtype) @ table
