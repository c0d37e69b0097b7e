"""Networks whose prediction is Bayes' rule by construction, with a prior that may change with the time."""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from tiny_models import tiny_lm
from torch import Tensor, nn
from toy_components import Projected, Read

from l2d_framework.backbone import Backbone
from l2d_framework.config import SamplingSection
from l2d_framework.models.diffusion_lm import DiffusionLM, Origin
from l2d_framework.parametrization import Parametrization
from l2d_framework.schedule import Schedule
from l2d_plugins.solvers.runge_kutta import Euler

TOKENS = 12


class Directions(Parametrization):
    """Tokens are rows of the backbone's table; the network sees the state itself."""

    def __init__(self, prior_scale: float) -> None:
        super().__init__()
        self.config: Any = Projected()
        self.prior_scale, self.state_size = prior_scale, 6

    def encode(self, tokens, table):
        return table[tokens]

    def embed(self, x, t, schedule, table, previous):
        return x

    def estimate(self, logits, t, codebook, random):
        return codebook[logits.argmax(-1)]


class BayesNetwork(Backbone):
    """softmax(log prior(y | token before, t) + log N(x_t; alpha clean(y), (sigma prior_scale)^2)).

    The prior is base^(1 - share) better^share, where `share` is a function of the time.
    """

    identity_at_zero: ClassVar[bool] = True
    independent_positions: ClassVar[bool] = True

    def __init__(self, schedule: Schedule, scale: float, share: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.config: Any = SimpleNamespace(num_classes=0)
        self.lm = tiny_lm()
        self.vocab_size, self.hidden_size = TOKENS, 6
        self.schedule, self.scale, self.share = schedule, scale, share
        self._table = torch.randn(TOKENS, 6, generator=generator)
        self.better = torch.randn(TOKENS, TOKENS, generator=generator).mul(2).log_softmax(-1)
        self.base = (0.4 * self.better).log_softmax(-1)

    def table(self):
        return self._table

    def read(self, layout):
        return Read(layout, layout.tokens)

    def extend(self, context, tokens):
        raise AssertionError("a diagnosis extends nothing")

    def prior(self, positions: Tensor, context: Read, share: Tensor) -> Tensor:
        before = context.layout.tokens.gather(1, positions - 1)
        mixed = share * self.better[before] + (1 - share) * self.base[before]
        return mixed.log_softmax(-1)

    def plain(self, positions, context):
        return self.prior(positions, context, torch.zeros(()))

    def features(self, h, t, positions, context, condition, *, shared_time=None):
        prior = self.prior(positions, context, self.share(t)[..., None])
        alpha, sigma = self.schedule.alpha(t)[..., None], self.schedule.sigma(t)[..., None] * self.scale
        squares = (h[..., None, :] - alpha[..., None] * self._table).square().sum(-1)
        return prior - squares / (2 * sigma**2)

    @property
    def head(self):
        return nn.Identity()


def bayes_lm(schedule: Schedule, share: Any, *, scale: float = 2.0) -> DiffusionLM:
    """The network as a model, sampled by Euler's method."""
    model = DiffusionLM(schedule, Directions(scale), BayesNetwork(schedule, scale, share))
    # Not to the very end, where the likelihood is singular.
    sampling = SamplingSection(solver=Euler(), num_inference_steps=6, end_time=0.95, block_size=None)
    model.origin = Origin(sampling=sampling)
    return model.eval()


def rows_from(logarithms: Tensor, count: int, length: int) -> list[dict[str, Any]]:
    """Rows whose every token is drawn from the one before, all but the first supervised."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(TOKENS, (count, 1), generator=generator)
    for _ in range(length - 1):
        drawn = torch.multinomial(logarithms[tokens[:, -1]].exp(), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], 1)
    supervised = [False] + [True] * (length - 1)
    return [
        {"input_ids": row, "supervised": supervised, "class_id": -1, "index": number}
        for number, row in enumerate(tokens.tolist())
    ]
