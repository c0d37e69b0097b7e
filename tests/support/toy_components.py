"""One small correct component of every kind, and of every capability a law depends on, unlike the built-ins."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import masked_diffusion
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from l2d_framework.backbone import Backbone, BackboneConfig
from l2d_framework.diffusion.rng import categorical
from l2d_framework.drafter import Drafter
from l2d_framework.errors import ConfigError, EvaluationBudgetError
from l2d_framework.guidance import Guidance
from l2d_framework.parametrization import Parametrization, ParametrizationConfig
from l2d_framework.schedule import NoiseLaw, Schedule, ScheduleConfig
from l2d_framework.solver import Solver
from l2d_framework.types import Layout, Prediction


class Circle(Schedule):
    name: Literal["circle"] = "circle"

    def alpha(self, t):
        return torch.sin(t * math.pi / 2)

    def sigma(self, t):
        return torch.cos(t * math.pi / 2)

    def sample_times(self, u):
        return 1 - (1 - u).sqrt()


class Halfway(ScheduleConfig):
    """Times between those of the circle and the middle of the losses it has heard."""

    name: Literal["halfway"] = "halfway"
    law: ClassVar[type[NoiseLaw]]

    def build(self):
        return self.law(self)


class HalfwayLaw(nn.Module, NoiseLaw):
    def __init__(self, config):
        super().__init__()
        self._config = config
        self.register_buffer("sums", torch.tensor([0.5, 1.0]))

    @property
    def config(self):
        return self._config

    def alpha(self, t):
        return Circle().alpha(t)

    def sigma(self, t):
        return Circle().sigma(t)

    def sample_times(self, u):
        middle = self.sums[0] / self.sums[1]
        return u ** (middle.log() / math.log(0.5)).clamp(0.5, 2).to(u)

    def fixed_times(self, u):
        return u

    def observe(self, t, loss):
        self.sums += torch.stack([(t * loss).sum(), loss.sum()])


Halfway.law = HalfwayLaw


class ProjectedEstimate(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    temperature: float = Field(1.0, gt=0)


class Projected(ParametrizationConfig):
    """Tokens are a linear image of their embeddings; the input mixes in the previous answer's embedding."""

    name: Literal["projected"] = "projected"
    size: int = Field(8, gt=0)
    estimate: ProjectedEstimate = ProjectedEstimate()
    module: ClassVar[type[Parametrization]]

    def build(self, vocab_size, hidden_size):
        return self.module(self, hidden_size)


class ProjectedSpace(Parametrization):
    uses_previous: ClassVar[bool] = True

    def __init__(self, config, hidden_size):
        super().__init__()
        self.config, self.state_size, self.prior_scale = config, config.size, 3.0
        self.down = nn.Linear(hidden_size, config.size)
        self.up = nn.Linear(config.size, hidden_size)

    def encode(self, tokens, table):
        return self.down(table[tokens])

    def codebook(self, table):
        return self.down(table)

    def embed(self, x, t, schedule, table, previous):
        h = self.up(x / (schedule.alpha(t) + self.prior_scale * schedule.sigma(t))[..., None])
        if previous is None:
            return h + table.mean(0)
        return h + (self.remember(previous, table) if previous.shape[-1] == len(table) else previous)

    def remember(self, logits, table):
        return logits.softmax(-1) @ table

    def estimate(self, logits, t, codebook, random):
        weights = (logits / self.config.estimate.temperature).softmax(-1)
        return codebook[categorical(weights, random.uniform())]


Projected.module = ProjectedSpace


class Forward(Solver):
    name: Literal["forward"] = "forward"

    def step(self, problem, x, t, s):
        return x + (s - t) * problem.velocity(x, t)


class Renoise(Solver):
    is_stochastic: ClassVar[bool] = True

    name: Literal["renoise"] = "renoise"

    def step(self, problem, x, t, s):
        time = torch.full(x.shape[:2], s)
        return problem.schedule.interpolate(problem.clean(x, t), problem.fresh_noise(x), time)


class Doubling(Solver):
    """Twice as many Heun steps for every token until its end no longer moves."""

    is_adaptive: ClassVar[bool] = True

    name: Literal["doubling"] = "doubling"
    max_evaluations: int = Field(4000, ge=10)

    @property
    def stages(self):
        return 2

    @property
    def order(self):
        return 2

    @property
    def evaluates_end(self):
        return True

    def with_budget(self, evaluations):
        return self.model_copy(update={"max_evaluations": evaluations})

    def step(self, problem, x, t, s, active=None):
        start = problem.velocity(x, t, active=active)
        return x + (s - t) / 2 * (start + problem.velocity(x + (s - t) * start, s, active=active))

    def solve(self, problem, x, times):
        active = torch.ones(x.shape[:2], dtype=torch.bool)
        found, count, used = torch.full_like(x, torch.inf), 2, 1
        while active.any():
            used += 2 * count
            if used > self.max_evaluations:
                raise EvaluationBudgetError(f"More than {self.max_evaluations} evaluations are needed.")
            y, h = x, (times[-1] - times[0]) / count
            for i in range(count):
                y = self.step(problem, y, times[0] + i * h, times[0] + (i + 1) * h, active)
            moved = (y - found).abs().amax(-1) > 1e-2
            found = torch.where(active[..., None], y, found)
            active, count = active & moved, 2 * count
        return found


class Sharpen(Guidance):
    name: Literal["sharpen"] = "sharpen"

    def __call__(self, predict, query, space):
        plain = predict(query)
        return Prediction(plain.logits + self.scales(query) * plain.logits, plain.clean)


class Recalling(Guidance):
    """Likes the tokens that have been written, so it needs to know them."""

    name: Literal["recalling"] = "recalling"

    def __call__(self, predict, query, space):
        plain = predict(query)
        present = space.layout.present.float()
        written = torch.zeros_like(plain.logits[:, 0]).scatter_reduce(1, space.layout.tokens, present, "amax")
        return Prediction(plain.logits + written[:, None])


@dataclass(frozen=True)
class Read:
    layout: Layout
    hidden: Tensor

    def select(self, rows):
        return type(self)(Layout(self.layout.tokens[rows], self.layout.blocks[rows]), self.hidden[rows])


class Beside(BackboneConfig):
    """Adds to the language model's hidden state a gated network of the noisy state."""

    name: Literal["beside"] = "beside"
    carry: bool = False
    module: ClassVar[type[Backbone]]

    def check(self, lm_config, block_size):
        if block_size != 1:
            raise ConfigError(f"block_size must be 1, got {block_size}.")

    def build(self, lm):
        return self.module(self, lm)


class BesideNetwork(Backbone):
    identity_at_zero: ClassVar[bool] = True
    independent_positions: ClassVar[bool] = True
    rewinds: ClassVar[bool] = True
    joins: ClassVar[bool] = True
    compiles: ClassVar[bool] = True

    def __init__(self, config, lm):
        super().__init__()
        self.config, self.lm = config, lm
        self.vocab_size, self.hidden_size = self.table().shape
        self.mix = nn.Linear(self.hidden_size, self.hidden_size)
        self.gate = nn.Parameter(torch.zeros(self.hidden_size))
        self.classes = nn.Embedding(config.num_classes + 1, self.hidden_size)
        self.carries = config.carry

    def table(self):
        return self.lm.get_input_embeddings().weight

    def carry(self, hidden):
        return self.mix(hidden) - self.mix.bias

    def read(self, layout):
        places = (layout.present.cumsum(-1) - 1).clamp_min(0)
        run = self.lm.model(layout.tokens, attention_mask=layout.present.long(), position_ids=places, use_cache=False)
        return Read(layout, run.last_hidden_state)

    def extend(self, context, tokens):
        return self.read(appended(context.layout, tokens))

    def rewind(self, context, counts):
        layout, least = context.layout, counts.min()
        source = torch.arange(layout.tokens.shape[1] - int(least)) - (counts - least)[:, None]
        tokens, blocks = (part.gather(1, source.clamp_min(0)) for part in (layout.tokens, layout.blocks))
        return self.read(Layout(tokens, torch.where(source < 0, -1, blocks)))

    def join(self, contexts, slots):
        widths = [context.layout.tokens.shape[1] for context in contexts]
        tokens, blocks = (
            torch.cat(
                [
                    nn.functional.pad(getattr(context.layout, name), (slots - width, 0), value=filler)
                    for context, width in zip(contexts, widths, strict=True)
                ]
            )
            for name, filler in (("tokens", 0), ("blocks", -1))
        )
        return self.read(Layout(tokens, blocks))

    def main(self, context, positions):
        return context.hidden.gather(1, (positions - 1)[..., None].expand(-1, -1, self.hidden_size))

    def features(self, h, t, positions, context, condition, *, shared_time=None, compiled=False):
        main = self.main(context, positions)
        label = torch.full_like(positions, -1) if condition is None else condition
        label = torch.where(label < 0, self.config.num_classes, label)
        change = torch.compile(self.change, backend="eager") if compiled else self.change
        return main + change(h + main, t, label)

    def change(self, h, t, label):
        return 30 * self.gate * torch.tanh(self.mix(h) + 10 * self.classes(label)) * t[..., None]

    def plain(self, positions, context):
        return self.main(context, positions)

    @property
    def head(self):
        return self.lm.lm_head


Beside.module = BesideNetwork


class Canvas(BackboneConfig):
    """Denoises one block in the language model itself, in which every position sees every other."""

    name: Literal["canvas"] = "canvas"
    module: ClassVar[type[Backbone]]

    def check(self, lm_config, block_size):
        if block_size is not None:
            raise ConfigError(f"block_size must be null, got {block_size}.")

    def build(self, lm):
        return self.module(self, lm)


class CanvasNetwork(Backbone):
    trains_lm: ClassVar[bool] = True
    sees_later = True

    def __init__(self, config, lm):
        super().__init__()
        self.config, self.lm = config, lm
        self.vocab_size, self.hidden_size = self.table().shape
        self.time = nn.Linear(1, self.hidden_size)

    def table(self):
        return self.lm.get_input_embeddings().weight

    def read(self, layout):
        return Read(layout, layout.tokens)

    def extend(self, context, tokens):
        return self.read(appended(context.layout, tokens))

    def features(self, h, t, positions, context, condition, *, shared_time=None):
        layout = context.layout
        missing = max(0, int(positions.max()) + 1 - layout.tokens.shape[1])
        layout = appended(layout, layout.tokens.new_zeros(len(layout.tokens), missing))
        inputs = self.table()[layout.tokens].scatter(1, positions[..., None].expand_as(h), h + self.time(t[..., None]))
        asked = torch.zeros_like(layout.present).scatter(1, positions, True)
        seen = ((layout.blocks == 0) | asked)[:, None, None, :].expand(-1, 1, inputs.shape[1], -1)
        seen = seen | torch.eye(inputs.shape[1], dtype=torch.bool)
        places = (layout.present.cumsum(-1) - 1).clamp_min(0)
        run = self.lm.model(inputs_embeds=inputs, attention_mask=seen, position_ids=places, use_cache=False)
        return run.last_hidden_state.gather(1, positions[..., None].expand_as(h))

    @property
    def head(self):
        return self.lm.lm_head


Canvas.module = CanvasNetwork


def appended(layout: Layout, tokens: Tensor) -> Layout:
    return Layout(torch.cat([layout.tokens, tokens], 1), torch.cat([layout.blocks, torch.zeros_like(tokens)], 1))


class Again(Drafter):
    """The last token of each row, again and again."""

    name: Literal["again"] = "again"

    def draft(self, ahead, count):
        return torch.stack([tokens[-1] for tokens in ahead.tokens])[:, None].expand(-1, count)


CORRECT: list[Any] = [
    Circle(),
    Halfway(),
    Projected(),
    Forward(),
    Renoise(),
    Doubling(),
    Sharpen(),
    Beside(),
    Beside(num_classes=2, carry=True),
    Canvas(),
    Again(),
    *masked_diffusion.TOYS,
]
