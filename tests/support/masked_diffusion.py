"""Masked diffusion as a third party would write it: a schedule, a state space and a solver that know no Gaussian."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from l2d_framework.diffusion.rng import categorical
from l2d_framework.parametrization import Parametrization, ParametrizationConfig
from l2d_framework.schedule import Schedule
from l2d_framework.solver import Solver, as_time

MASK = -1.0


class Masking(Schedule):
    """A token is still masked at t with probability 1 - t; alpha' / (1 - alpha) makes of the loss a bound on -log p."""

    name: Literal["masking"] = "masking"

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - t

    def weight(self, t):
        return 1 / (1 - t)


class MaskedEstimate(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    mode: Literal["sample", "argmax"] = "argmax"


class Masked(ParametrizationConfig):
    """A state is a token's id and how certain it is; that of a masked token is (-1, 0)."""

    name: Literal["masked"] = "masked"
    estimate: MaskedEstimate = MaskedEstimate()
    gaussian_path: ClassVar[bool] = False
    module: ClassVar[type[Parametrization]]

    def build(self, vocab_size, hidden_size):
        return self.module(self, hidden_size)


class MaskedSpace(Parametrization):
    def __init__(self, config, hidden_size):
        super().__init__()
        self.config, self.state_size, self.prior_scale = config, 2, 1.0
        self.mask = nn.Parameter(torch.randn(hidden_size))

    def encode(self, tokens, table):
        return torch.stack([tokens.float(), torch.ones(tokens.shape)], -1)

    def prior(self, random):
        return torch.tensor([MASK, 0.0]).expand(*random.uniform().shape, 2)

    def corrupt(self, tokens, noise, t, schedule, table):
        is_kept = torch.special.ndtr(noise[..., 0]) <= schedule.alpha(t)
        return torch.where(is_kept[..., None], self.encode(tokens, table), torch.tensor([MASK, 0.0]))

    def embed(self, x, t, schedule, table, previous):
        ids = x[..., 0].round().long()
        return torch.where(ids[..., None] < 0, self.mask, table[ids.clamp_min(0)])

    def refine(self, logits, x, t, schedule, codebook):
        ids = x[..., :1].round().long()
        known = torch.full_like(logits, -1e4).scatter(-1, ids.clamp_min(0), 0.0)
        return torch.where(ids < 0, logits, known)

    def estimate(self, logits, t, codebook, random):
        chances = logits.softmax(-1)
        sampled = self.config.estimate.mode == "sample"
        tokens = categorical(chances, random.uniform()) if sampled else logits.argmax(-1)
        return torch.stack([tokens.float(), chances.gather(-1, tokens[..., None])[..., 0]], -1)


Masked.module = MaskedSpace


class Unmask(Solver):
    """Reveals the share of the masked tokens that the schedule asks for, at random or the most certain first."""

    name: Literal["unmask"] = "unmask"
    order_by: Literal["random", "certainty"] = "random"

    gaussian_path: ClassVar[bool] = False
    is_stochastic: ClassVar[bool] = True

    def step(self, problem, x, t, s):
        clean, masked = problem.clean(x, t), x[..., 0] < 0
        alpha, later = (problem.schedule.alpha(as_time(time, x)) for time in (t, s))
        if self.order_by == "random":
            chosen = torch.special.ndtr(problem.fresh_noise(x)[..., 0]) <= (later - alpha) / (1 - alpha)
        else:
            places = clean[..., 1].where(masked, -1.0).argsort(-1, descending=True).argsort(-1)
            left = ((1 - later) * masked.shape[1]).round()
            chosen = places < masked.sum(-1, keepdim=True) - left
        return torch.where((masked & chosen)[..., None], clean, x)


TOYS: list[Any] = [Masking(), Masked(), Masked(estimate=MaskedEstimate(mode="sample")), Unmask()]
