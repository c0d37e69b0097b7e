"""For each law of the conformance kit, components that break it: (check, component, part of the message)."""

import copy
from typing import ClassVar, Literal

import torch
from masked_diffusion import Masked, MaskedSpace
from pydantic import ConfigDict, Field, PrivateAttr
from toy_components import Again, Circle, Doubling, Forward, Halfway, HalfwayLaw, Projected, ProjectedSpace, Sharpen

from l2d_framework.guidance import Guidance
from l2d_framework.parametrization import Parametrization, ParametrizationConfig
from l2d_framework.solver import Solver
from l2d_framework.testing import common, drafters, guidance, parametrizations, schedules, solvers
from l2d_framework.types import Prediction


class AnyName(Sharpen):
    name: str = "any"


class TupleField(Sharpen):
    pair: tuple[int, int] = (1, 2)


class Lenient(Sharpen):
    model_config = ConfigDict(extra="ignore")


class Mutable(Sharpen):
    model_config = ConfigDict(frozen=False)


class BadDefault(Sharpen):
    scale: float = Field(-1.0, ge=0)


class Guessing(Sharpen):
    model_config = ConfigDict(strict=False)


class NamelessExtra(Sharpen):
    requires: ClassVar[tuple[str, ...]] = ("torch",)


COMMON = [
    (common.check_name_is_literal, AnyName(), "must be a Literal"),
    (common.check_json_round_trip, TupleField(), "cannot be read back"),
    (common.check_unknown_field_is_refused, Lenient(), "accepts the unknown option"),
    (common.check_is_frozen, Mutable(), "can be assigned to"),
    (common.check_defaults_are_valid, BadDefault(), "default of BadDefault is not valid"),
    (common.check_types_are_strict, Guessing(), "accepts the text '1.0'"),
    (common.check_extra_is_named, NamelessExtra(), "does not say what to install"),
]


class SinglePrecision(Circle):
    def alpha(self, t):
        return super().alpha(t).float()


class HalfWay(Circle):
    def alpha(self, t):
        return t / 2


class Bumpy(Circle):
    def sigma(self, t):
        return (1 - t) * (1 + 0.5 * torch.sin(20 * t))


class WrongSlope(Circle):
    def derivatives(self, t):
        return torch.ones_like(t), -torch.ones_like(t)


class UnscaledNoise(Circle):
    def noise(self, x, clean, t):
        return x - self.alpha(t)[..., None] * clean


class Backwards(Circle):
    def velocity(self, x, clean, t):
        return x - clean


class LateTimes(Circle):
    def sample_times(self, u):
        return 1.001 * u


class Wavering(Circle):
    def sample_times(self, u):
        return (u + 0.05 * torch.sin(50 * u)).clamp(0, 1)


class NoWeight(Circle):
    def weight(self, t):
        return 1 / t


class LessNoise(Circle):
    def noisier(self, t):
        return (t + 1e-3).clamp_max(1)


class BeyondNoise(Circle):
    def noisier(self, t):
        return t - 1e-3


class SameNoise(Circle):
    def noisier(self, t):
        return t


class Forgetful(HalfwayLaw):
    def __init__(self, config):
        super().__init__(config)
        self.sums = self._buffers.pop("sums")


class Drifting(HalfwayLaw):
    def fixed_times(self, u):
        return self.sample_times(u)


class Runaway(HalfwayLaw):
    def sample_times(self, u):
        return u * (self.sums[1] / 2).clamp_min(1)


def learned(law: type[HalfwayLaw]) -> Halfway:
    class Broken(Halfway):
        pass

    Broken.law, Broken.__name__ = law, law.__name__
    return Broken()


class LongGrid(Circle):
    def grid(self, count, end):
        return super().grid(count + 1, end)


SCHEDULES = [
    (schedules.check_schedule_shapes, SinglePrecision(), "alpha of .* came out as"),
    (schedules.check_schedule_endpoints, HalfWay(), "alpha must be 0 at t = 0 and 1 at t = 1"),
    (schedules.check_schedule_signal_to_noise_rises, Bumpy(), "sigma rises after"),
    (schedules.check_schedule_derivatives, WrongSlope(), "must be the slope of alpha"),
    (schedules.check_schedule_noise_inverts_interpolate, UnscaledNoise(), "must undo interpolate"),
    (schedules.check_schedule_velocity_follows_path, Backwards(), "must point along the path"),
    (schedules.check_schedule_training_times, LateTimes(), r"sample_times gives \[1.0"),
    (schedules.check_schedule_training_times, Wavering(), "sample_times turns back after"),
    (schedules.check_schedule_weight, NoWeight(), r"weight gives \[inf\]"),
    (schedules.check_schedule_noisier, LessNoise(), "moves away from the noise"),
    (schedules.check_schedule_noisier, BeyondNoise(), r"noisier leaves \[0, 1\]"),
    (schedules.check_schedule_noisier, SameNoise(), "leaves most times where they are"),
    (schedules.check_schedule_training_times, learned(Runaway), "sample_times gives"),
    (schedules.check_schedule_is_its_state_dict, learned(Forgetful), "different times"),
    (schedules.check_schedule_is_its_state_dict, learned(Drifting), "fixed_times change"),
    (schedules.check_schedule_grid, LongGrid(), r"grid\(1, 1.0\) has 2 times"),
]


class DoubleStates(ProjectedSpace):
    def encode(self, tokens, table):
        return super().encode(tokens, table).double()


class Pairs(ProjectedSpace):
    def encode(self, tokens, table):
        return super().encode(tokens // 2, table)


class Shrunk(ProjectedSpace):
    def estimate(self, logits, t, codebook, random):
        return 0.9 * super().estimate(logits, t, codebook, random)


class Stale(ProjectedSpace):
    kept = None

    def codebook(self, table):
        if self.kept is None:
            self.kept = super().codebook(table).clone()
        return self.kept


class GlobalDraws(ProjectedSpace):
    def estimate(self, logits, t, codebook, random):
        return codebook[torch.multinomial(logits.flatten(0, 1).softmax(-1), 1).view(t.shape)]


class BatchAverage(ProjectedSpace):
    def estimate(self, logits, t, codebook, random):
        return super().estimate(logits - logits.mean((0, 1)), t, codebook, random)


class Explodes(ProjectedSpace):
    def embed(self, x, t, schedule, table, previous):
        return super().embed(x / schedule.sigma(t)[..., None], t, schedule, table, previous)


class BatchNormal(ProjectedSpace):
    def embed(self, x, t, schedule, table, previous):
        return super().embed(x / x.std(), t, schedule, table, previous)


class ForgetsNothing(ProjectedSpace):
    """Takes no previous answer for one that says nothing, not for one that says anything is as likely."""

    def embed(self, x, t, schedule, table, previous):
        if previous is None:
            previous = torch.eye(len(table))[0].expand(*x.shape[:2], -1) * 1e4
        return super().embed(x, t, schedule, table, previous)


class RemembersBest(ProjectedSpace):
    def embed(self, x, t, schedule, table, previous):
        if previous is not None and previous.shape[-1] == len(table):
            previous = super().remember(previous, table)
        return super().embed(x, t, schedule, table, previous)

    def remember(self, logits, table):
        return table[logits.argmax(-1)]


class Ambiguous(ProjectedSpace):
    def remember(self, logits, table):
        return logits / 2


class FlatNoise(ProjectedSpace):
    def noise(self, random):
        return 12**0.5 * (torch.stack([random.uniform() for _ in range(self.state_size)], -1) - 0.5)


class OneNumber(ProjectedSpace):
    def noise(self, random):
        return random.normal(1).expand(-1, -1, self.state_size)


class GlobalNoise(ProjectedSpace):
    def noise(self, random):
        return torch.randn_like(random.normal(self.state_size))


class CentredNoise(ProjectedSpace):
    def noise(self, random):
        noise = random.normal(self.state_size)
        return noise - 0.5 * noise.mean((0, 1))


class LoudPrior(ProjectedSpace):
    def prior(self, random):
        return 2 * super().prior(random)


class NeverClean(ProjectedSpace):
    def corrupt(self, tokens, noise, t, schedule, table):
        return super().corrupt(tokens, noise, 0.9 * t, schedule, table)


class ShuffledNoise(ProjectedSpace):
    def corrupt(self, tokens, noise, t, schedule, table):
        return super().corrupt(tokens, noise - noise.mean((0, 1)), t, schedule, table)


class Deaf(ProjectedSpace):
    def corrupt(self, tokens, noise, t, schedule, table):
        return super().corrupt(tokens, noise, t**2, schedule, table)


class Stubborn(MaskedSpace):
    def refine(self, logits, x, t, schedule, codebook):
        return super().refine(logits, -1 - 0 * x, t, schedule, codebook)


class Gossip(MaskedSpace):
    def refine(self, logits, x, t, schedule, codebook):
        return super().refine(logits - logits.mean((0, 1)), x, t, schedule, codebook)


class Undeclared(ProjectedSpace):
    uses_previous: ClassVar[bool] = False


class HiddenWeights(ProjectedSpace):
    def __init__(self, config, hidden_size):
        super().__init__(config, hidden_size)
        self.rotation = torch.randn(config.size, config.size)

    def encode(self, tokens, table):
        return super().encode(tokens, table) @ self.rotation


class Copies(ProjectedSpace):
    def with_estimate(self, options):
        return copy.deepcopy(super().with_estimate(options))


class Modest(Projected):
    gaussian_path: ClassVar[bool] = False


def masked(space: type[MaskedSpace]) -> Masked:
    return projected(space, Masked)


def projected(space: type[Parametrization], config: type[ParametrizationConfig] = Projected) -> ParametrizationConfig:
    class Broken(config):
        module = space

    Broken.__name__ = space.__name__
    return Broken()


PARAMETRIZATIONS = [
    (parametrizations.check_parametrization_shapes, projected(DoubleStates), "encode gave .* torch.float64"),
    (parametrizations.check_parametrization_tells_tokens_apart, projected(Pairs), "the same clean state"),
    (parametrizations.check_estimate_of_onehot_is_encode, projected(Shrunk), r"must be encode\(tokens\)"),
    (parametrizations.check_codebook_is_not_stale, projected(Stale), "must follow the weights"),
    (parametrizations.check_estimate_keeps_to_its_streams, projected(GlobalDraws), "global generator"),
    (parametrizations.check_estimate_is_tokenwise, projected(BatchAverage), "must not depend on its batch mates"),
    (parametrizations.check_prior_is_corruption_at_the_start, projected(LoudPrior), "prior must be"),
    (parametrizations.check_corruption_ends_clean, projected(NeverClean), "corrupt must be encode at t = 1"),
    (parametrizations.check_gaussian_path_is_declared, projected(Deaf), "gaussian_path is True, and corrupt"),
    (parametrizations.check_gaussian_path_is_declared, Modest(), "gaussian_path is False, though"),
    (parametrizations.check_corruption_is_tokenwise, projected(ShuffledNoise), "must not depend on its batch mates"),
    (parametrizations.check_refinement_knows_clean_states, masked(Stubborn), "does not know the token"),
    (parametrizations.check_refinement_is_tokenwise, masked(Gossip), "must not depend on its batch mates"),
    (parametrizations.check_embed_is_finite, projected(Explodes), "not finite at t = 1.0"),
    (parametrizations.check_embed_is_tokenwise, projected(BatchNormal), "must not depend on its batch mates"),
    (parametrizations.check_embed_uses_previous_where_declared, projected(Undeclared), "uses_previous is False"),
    (parametrizations.check_no_previous_is_uniform, projected(ForgetsNothing), "must equal logits of zero"),
    (parametrizations.check_embed_needs_only_what_is_remembered, projected(RemembersBest), "of what is remembered"),
    (parametrizations.check_embed_needs_only_what_is_remembered, projected(Ambiguous), "as wide as logits"),
    (parametrizations.check_noise_is_standard_normal, projected(FlatNoise), "not standard normal"),
    (parametrizations.check_noise_is_standard_normal, projected(OneNumber), "of one token are not independent"),
    (parametrizations.check_noise_keeps_to_its_streams, projected(GlobalNoise), "global generator"),
    (parametrizations.check_noise_keeps_to_its_streams, projected(CentredNoise), "must not depend on its batch mates"),
    (parametrizations.check_parametrization_is_its_state_dict, projected(HiddenWeights), "on the state dict only"),
    (parametrizations.check_estimate_options, projected(Copies), "must share the weights"),
]


class Slow(Forward):
    def step(self, problem, x, t, s):
        return x + 0.9 * (s - t) * problem.velocity(x, t)


class GlobalJitter(Forward):
    def step(self, problem, x, t, s):
        return super().step(problem, x + 1e-3 * torch.randn_like(x), t, s)


class InPlace(Forward):
    def step(self, problem, x, t, s):
        return x.add_((s - t) * problem.velocity(x, t))


class Implicit(Forward):
    def step(self, problem, x, t, s):
        return x + (s - t) * problem.velocity(x, s)


class Overclaiming(Solver):
    """The midpoint method, which never evaluates the end."""

    stages: ClassVar[int] = 2
    order: ClassVar[int] = 2
    evaluates_end: ClassVar[bool] = True

    name: Literal["overclaiming"] = "overclaiming"

    def step(self, problem, x, t, s):
        half = (s - t) / 2
        return x + (s - t) * problem.velocity(x + half * problem.velocity(x, t), t + half)


class Miscounted(Forward):
    def step(self, problem, x, t, s):
        half = (t + s) / 2
        return super().step(problem, super().step(problem, x, t, half), half, s)


class WordlessRefusal(Forward):
    @property
    def stages(self):
        return 2

    def grid_size(self, num_inference_steps):
        try:
            return super().grid_size(num_inference_steps)
        except ValueError as error:
            raise type(error)("No.") from error


class Boastful(Forward):
    @property
    def order(self):
        return 2


class StraightOnly(Forward):
    def step(self, problem, x, t, s):
        return x + (s - t) * (problem.clean(x, t) - x) / (1 - t)


class OneStep(Doubling):
    def solve(self, problem, x, times):
        return self.step(problem, x, times[0], times[-1])


class Spendthrift(Doubling):
    def with_budget(self, evaluations):
        return self


class SharedSteps(Solver):
    """Steps that suit the fastest token of the batch."""

    name: Literal["shared-steps"] = "shared-steps"

    def step(self, problem, x, t, s):
        slope = problem.velocity(x, t)
        return x + (s - t) * slope / (1 + 1e-2 * slope.abs().max())


class RunsOn(Doubling):
    """Evaluates finished tokens as long as any other is under way."""

    def step(self, problem, x, t, s, active=None):
        return super().step(problem, x, t, s)


SOLVERS = [
    (solvers.check_solver_reaches_a_constant, Slow(), "a constant clean state must be reached"),
    (solvers.check_solver_is_repeatable, GlobalJitter(), "global generator"),
    (solvers.check_solver_is_repeatable, InPlace(), "in place"),
    (solvers.check_solver_times, Implicit(), "set evaluates_end"),
    (solvers.check_solver_evaluation_count, Miscounted(), "num_inference_steps=2 became"),
    (solvers.check_solver_evaluation_count, WordlessRefusal(), "names no number that works"),
    (solvers.check_solver_order, Boastful(), "Order 2 is declared, 1.0"),
    (solvers.check_solver_order, StraightOnly(), "on bent paths"),
    (solvers.check_solver_is_the_textbooks, Overclaiming(), "as the textbook writes it"),
    (solvers.check_solver_accuracy, OneStep(), "The solution is missed"),
    (solvers.check_solver_budget, Spendthrift(), "with a budget of 20"),
    (solvers.check_solver_tokens_are_independent, SharedSteps(), "must not depend on its batch mates"),
    (solvers.check_solver_tokens_are_independent, RunsOn(), "evaluations alone"),
]


class OnePosition(Sharpen):
    def __call__(self, predict, query, space):
        return Prediction(predict(query).logits[:, :1])


class KeepsGraph(Sharpen):
    def __call__(self, predict, query, space):
        with torch.enable_grad():
            return Prediction(predict(query).logits.requires_grad_() * 2)


class Overwrites(Sharpen):
    def __call__(self, predict, query, space):
        plain = predict(query)
        plain.logits.mul_(1 + self.scale)
        return plain


class BatchNormalised(Sharpen):
    def __call__(self, predict, query, space):
        plain = predict(query)
        return Prediction(plain.logits + self.scales(query) * plain.logits / plain.logits.norm(), plain.clean)


class NeverNeutral(Sharpen):
    def __call__(self, predict, query, space):
        plain = predict(query)
        return Prediction(plain.logits * (1.001 + self.scales(query)), plain.clean)


class DropsClean(Guidance):
    name: Literal["drops-clean"] = "drops-clean"

    def __call__(self, predict, query, space):
        logits = predict(query).logits
        return Prediction(logits + self.scales(query) * logits)


class OwnScaleOnly(Sharpen):
    def __call__(self, predict, query, space):
        return super().__call__(predict, query.replace(guidance_scale=None), space)


class Idle(Sharpen):
    def __call__(self, predict, query, space):
        return predict(query)


GUIDANCE = [
    (guidance.check_guidance_shapes, OnePosition(), "logits has shape"),
    (guidance.check_guidance_shapes, KeepsGraph(), "keeps a graph"),
    (guidance.check_guidance_leaves_its_inputs, Overwrites(), "changed in place"),
    (guidance.check_guidance_is_rowwise, BatchNormalised(), "must not depend on its batch mates"),
    (guidance.check_guidance_is_neutral, NeverNeutral(), "the logits change by"),
    (guidance.check_guidance_is_neutral, DropsClean(), "asked from ToyGuided"),
    (guidance.check_guidance_obeys_requested_scales, OwnScaleOnly(), "asks for the neutral scale"),
    (guidance.check_guidance_obeys_requested_scales, Idle(), "changes nothing at all"),
]


class Halves(Again):
    def draft(self, ahead, count):
        return super().draft(ahead, count) / 2


class OneTooMany(Again):
    def draft(self, ahead, count):
        return super().draft(ahead, count + 1)


class Beyond(Again):
    def draft(self, ahead, count):
        return super().draft(ahead, count) + 100


class PicksMore(Again):
    def draft(self, ahead, count):
        return torch.stack([ahead.pick(ahead.language_model()) for _ in range(count + 1)], 1)[:, :count]


class OfAll(Again):
    def draft(self, ahead, count):
        return super().draft(ahead, count).amax(0, keepdim=True).expand(len(ahead.tokens), -1)


class Stale(Again):
    """Repeats what each row ended with at first."""

    _last: dict[int, int] = PrivateAttr(default_factory=dict)

    def begin(self, lm):
        return Stale()

    def draft(self, ahead, count):
        for row, tokens in zip(ahead.rows, ahead.tokens, strict=True):
            self._last.setdefault(row, int(tokens[-1]))
        return torch.tensor([[self._last[row]] * count for row in ahead.rows])


DRAFTERS = [
    (drafters.check_drafter_guesses_tokens, Halves(), "is int64"),
    (drafters.check_drafter_guesses_tokens, OneTooMany(), "at most 1 tokens are wanted"),
    (drafters.check_drafter_guesses_tokens, Beyond(), "not all among"),
    (drafters.check_drafter_guesses_tokens, PicksMore(), "More tokens were picked"),
    (drafters.check_drafter_is_rowwise, OfAll(), "must not depend on others"),
    (drafters.check_drafter_remembers_what_is_so, Stale(), "Nothing may be left of guesses that were wrong"),
]

BROKEN = [*COMMON, *SCHEDULES, *PARAMETRIZATIONS, *SOLVERS, *GUIDANCE, *DRAFTERS]
