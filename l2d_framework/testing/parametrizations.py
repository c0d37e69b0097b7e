"""Laws of parametrizations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.nn import functional

from l2d_framework.diffusion.logits import dense
from l2d_framework.errors import ConfigError
from l2d_framework.parametrization import Parametrization, ParametrizationConfig
from l2d_framework.testing.laws import Check, Laws, distance, ensure, ensure_close
from l2d_framework.testing.toys import ToySchedule, toy_streams

VOCAB, HIDDEN = 29, 24
"""V and H; with fewer tokens than hidden units nothing would be worth remembering but logits."""
_SCHEDULE = ToySchedule()
_ONE = (slice(1, None), slice(1, 2))
"""One token of those asked about."""


class _Case:
    """A fresh state space in evaluation mode, and what it is asked about: a table (V, H), tokens, logits and times."""

    def __init__(self, config: ParametrizationConfig, seed: int = 0) -> None:
        self.table = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(7))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.space: Parametrization = config.build(VOCAB, HIDDEN).eval()
        generator = torch.Generator().manual_seed(8)
        self.config, self.tokens = config, torch.tensor([[0, 3, 5, 7], [11, 12, 1, 2]])
        self.logits = torch.randn(*self.tokens.shape, VOCAB, generator=generator)
        self.t = torch.rand(self.tokens.shape, generator=generator)
        self.certain = 1e4 * functional.one_hot(self.tokens, VOCAB).float()

    def at(self, time: float) -> Tensor:
        return torch.full(self.tokens.shape, float(time))

    def encode(self) -> Tensor:
        return self.space.encode(self.tokens, self.table)

    def noise(self) -> Tensor:
        return self.space.noise(toy_streams(self.tokens))

    def corrupt(self, t: Tensor) -> Tensor:
        return self.space.corrupt(self.tokens, self.noise(), t, _SCHEDULE, self.table)

    def estimate(self, logits: Tensor, t: Tensor, codebook: Tensor) -> Tensor:
        return self.space.estimate(logits, t, codebook, toy_streams(self.tokens))

    def embed(self, x: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        return self.space.embed(x, t, _SCHEDULE, self.table, previous)

    def refine(self, x: Tensor, t: Tensor) -> Tensor:
        return self.space.refine(self.logits, x, t, _SCHEDULE, self.space.codebook(self.table))


def _of_case(check: Callable[[_Case], None]) -> Check:
    @wraps(check)
    @torch.no_grad()
    def checked(config: ParametrizationConfig) -> None:
        check(_Case(config))

    return checked


law = Laws(_of_case, lambda config: _Case(config).space)


@law
def check_parametrization_shapes(case: _Case) -> None:
    """States are (B, L, D) in float32, and the prior has a scale."""
    space, tokens = case.space, case.tokens
    scale = space.prior_scale
    ensure(math.isfinite(scale) and scale > 0, f"prior_scale is {scale}, not positive.")
    ensure(space.config == case.config, f"The module's config is {space.config!r}, not the one it was built from.")
    estimate = case.estimate(case.logits, case.t, space.codebook(case.table))
    for name, x in {"encode": case.encode(), "estimate": estimate}.items():
        ensure(
            x.shape == (*tokens.shape, space.state_size) and x.dtype == torch.float32,
            f"{name} gave {tuple(x.shape)} {x.dtype} for tokens {tuple(tokens.shape)} and D = {space.state_size}.",
        )
        ensure(x.isfinite().all(), f"{name} gave numbers that are not finite.")


@law
def check_parametrization_tells_tokens_apart(case: _Case) -> None:
    """No two tokens share a clean state."""
    clean = case.space.encode(torch.arange(VOCAB)[None], case.table)[0]
    gaps = torch.cdist(clean, clean) + torch.eye(VOCAB) * clean.norm(dim=-1).max()
    ensure(gaps.min() > 1e-3 * clean.norm(dim=-1).max(), "encode gives two tokens the same clean state.")


@law
def check_estimate_of_onehot_is_encode(case: _Case) -> None:
    """A network that is certain of a token moves the state to that token, at every time."""
    for time in (0.0, 0.5, 1.0):
        estimate = case.estimate(case.certain, case.at(time), case.space.codebook(case.table))
        ensure_close(estimate, case.encode(), f"estimate(certain logits) must be encode(tokens) at t = {time}")


@law
def check_codebook_is_not_stale(case: _Case) -> None:
    """A codebook made once serves any number of estimates, and a fresh one follows every change of the weights."""
    kept = case.space.codebook(case.table)
    first = case.estimate(case.logits, case.t, kept)
    again = case.space.codebook(case.table)
    for codebook, claim in ((kept, "a codebook must not be used up"), (again, "codebook must not vary")):
        ensure_close(case.estimate(case.logits, case.t, codebook), first, claim)
    for weight in case.space.parameters():
        weight.add_(torch.linspace(-0.3, 0.3, weight.numel()).view_as(weight))
    case.table = case.table.flip(0)
    estimate = case.estimate(case.certain, case.t, case.space.codebook(case.table))
    ensure_close(estimate, case.encode(), "codebook must follow the weights and the table")


@law
def check_estimate_keeps_to_its_streams(case: _Case) -> None:
    """An estimate draws from the streams it is given and from nothing else."""
    codebook = case.space.codebook(case.table)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = case.estimate(case.logits, case.t, codebook)
        ensure(torch.equal(torch.get_rng_state(), before), "estimate draws from torch's global generator.")
        torch.manual_seed(2)
        again = case.estimate(case.logits, case.t, codebook)
    ensure_close(again, first, "equal streams must give equal estimates")


@law
def check_estimate_is_tokenwise(case: _Case) -> None:
    """A token's estimate does not depend on what else is in the batch."""
    codebook = case.space.codebook(case.table)
    together = case.estimate(case.logits, case.t, codebook)
    alone = case.space.estimate(case.logits[_ONE], case.t[_ONE], codebook, toy_streams(case.tokens[_ONE]))
    ensure_close(together[_ONE], alone, "a token's estimate must not depend on its batch mates")


@law
def check_prior_is_corruption_at_the_start(case: _Case) -> None:
    """At t = 0 a token has become the prior, whichever token it was."""
    prior, noise = dense(case.space.prior(toy_streams(case.tokens))), case.noise()
    for tokens in (case.tokens, case.tokens.flip(1)):
        x = case.space.corrupt(tokens, noise, case.at(0), _SCHEDULE, case.table)
        ensure_close(dense(x), prior, "prior must be what corrupt makes of the same noise at t = 0")


@law
def check_corruption_ends_clean(case: _Case) -> None:
    """At t = 1 no noise is left, and nothing else before."""
    clean = dense(case.encode())
    ensure_close(dense(case.corrupt(case.at(1))), clean, "corrupt must be encode at t = 1")
    ensure(distance(dense(case.corrupt(case.at(0.5))), clean) > 1e-3, "corrupt leaves every token as it is at t = 0.5.")


@law
def check_gaussian_path_is_declared(case: _Case) -> None:
    """Noisy states are alpha * clean + sigma * noise if and only if the config declares a Gaussian path."""
    noise, t, clean = case.noise(), case.at(0.5), dense(case.encode())
    straight = _SCHEDULE.interpolate(clean, case.space.prior_scale * dense(noise), t)
    is_gaussian = distance(dense(case.corrupt(t)), straight) < 1e-4
    declared, path = case.config.gaussian_path, "alpha * clean + sigma * noise"
    ensure(
        is_gaussian or not declared, f"gaussian_path is True, and corrupt makes something else of tokens than {path}."
    )
    ensure(declared or not is_gaussian, f"gaussian_path is False, though corrupt makes {path} of tokens.")


@law
def check_corruption_is_tokenwise(case: _Case) -> None:
    """A token's noisy state depends on its own token, noise and time, and on nothing else."""
    noise, together = case.noise(), dense(case.corrupt(case.t))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        alone = case.space.corrupt(case.tokens[_ONE], noise[_ONE], case.t[_ONE], _SCHEDULE, case.table)
    ensure_close(together[_ONE], dense(alone), "a token's noisy state must not depend on its batch mates or on dice")


def _refines(space: Parametrization) -> bool:
    return space.refines


@law.where(_refines)
def check_refinement_knows_clean_states(case: _Case) -> None:
    """Where no noise is left, the state names its token against whatever the network says."""
    before = case.logits.clone()
    refined = case.refine(case.encode(), case.at(1))
    sound = refined.shape == before.shape and refined.isfinite().all()
    ensure(sound, "refine must give finite logits of the same shape.")
    ensure(torch.equal(case.logits, before), "refine changes the logits it is given.")
    ensure(torch.equal(refined.argmax(-1), case.tokens), "refine does not know the token of a clean state.")


@law.where(_refines)
def check_refinement_is_tokenwise(case: _Case) -> None:
    """A token's logits depend on its own state and time, and on nothing else."""
    x = case.corrupt(case.t)
    together = case.refine(x, case.t)
    alone = case.space.refine(case.logits[_ONE], x[_ONE], case.t[_ONE], _SCHEDULE, case.space.codebook(case.table))
    ensure_close(together[_ONE], alone, "a token's logits must not depend on its batch mates")


@law
def check_embed_is_finite(case: _Case) -> None:
    """The network input is (B, L, H) and finite from pure noise to clean states, with and without a previous answer."""
    for time in (0.0, 1e-6, 0.5, 1 - 1e-6, 1.0):
        x = case.corrupt(case.at(time))
        for previous in (None, case.logits):
            h = case.embed(x, case.at(time), previous)
            ensure(h.shape == (*case.tokens.shape, HIDDEN), f"embed gave {tuple(h.shape)} for H = {HIDDEN}.")
            ensure(h.isfinite().all(), f"embed gave numbers that are not finite at t = {time}.")


@law
def check_embed_is_tokenwise(case: _Case) -> None:
    """A token's network input does not depend on what else is in the batch."""
    x = case.space.prior(toy_streams(case.tokens))
    together, alone = case.embed(x, case.t, None), case.embed(x[_ONE], case.t[_ONE], None)
    ensure_close(together[_ONE], alone, "a token's network input must not depend on its batch mates")


@law
def check_embed_uses_previous_where_declared(case: _Case) -> None:
    """The previous answer changes the network input if, and only if, the space declares `uses_previous`."""
    # A map that starts at zero shows nothing of what it will read.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        for weight in case.space.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    without, with_previous = (case.embed(case.encode(), case.t, previous) for previous in (None, case.logits))
    effect, declared = distance(with_previous, without), case.space.uses_previous
    ensure(
        (effect > 1e-4) == declared,
        f"uses_previous is {declared}, but the previous answer changes the network input by {effect:.3g}.",
    )


@law.where(lambda space: space.uses_previous)
def check_no_previous_is_uniform(case: _Case) -> None:
    """No previous answer is the same as one that finds every token equally likely, remembered or not."""
    x, zero = case.encode(), torch.zeros_like(case.logits)
    without = case.embed(x, case.t, None)
    for previous in (zero, case.space.remember(zero, case.table)):
        ensure_close(case.embed(x, case.t, previous), without, "no previous answer must equal logits of zero")


@law.where(lambda space: space.uses_previous)
def check_embed_needs_only_what_is_remembered(case: _Case) -> None:
    """What is remembered of an answer serves the network input as well as its logits, and is never taken for logits."""
    logits, x = case.logits, case.encode()
    memory = case.space.remember(logits, case.table)
    ensure(memory.shape[:2] == logits.shape[:2], f"remember gave {tuple(memory.shape)} for {tuple(logits.shape)}.")
    ensure(
        memory.shape[-1] != VOCAB or torch.equal(memory, logits),
        "remember gives something as wide as logits that is not the logits; embed cannot tell it from them.",
    )
    from_memory, from_logits = (case.embed(x, case.t, previous) for previous in (memory, logits))
    ensure_close(from_memory, from_logits, "the network input of what is remembered must be that of the logits")


@law
def check_parametrization_is_its_state_dict(case: _Case) -> None:
    """Two modules of one configuration and one state dict encode and embed alike."""
    other = _Case(case.config, seed=1)
    other.space.load_state_dict(case.space.state_dict())
    ensure_close(other.encode(), case.encode(), "encode must depend on the state dict only")
    h, again = (one.embed(case.encode(), case.t, case.logits) for one in (case, other))
    ensure_close(again, h, "embed must depend on the state dict only")


@law.where(lambda space: "estimate" in type(space.config).model_fields)
def check_estimate_options(case: _Case) -> None:
    """Other sampling-time options share every weight, and a misspelt one is refused."""
    other = case.space.with_estimate(case.config.to_json()["estimate"])
    ensure(other.config == case.config, f"Repeating the options changed the config to {other.config!r}.")
    pairs = zip(case.space.parameters(), other.parameters(), strict=True)
    ensure(all(a is b for a, b in pairs), "with_estimate must share the weights, not copy them.")
    try:
        case.space.with_estimate({"no_such_option": 1})
    except ConfigError:
        return
    raise AssertionError('with_estimate accepts the unknown option "no_such_option".')


@law
def check_noise_is_standard_normal(case: _Case) -> None:
    """Noise is (B, L, D), standard normal, and independent within a token and between tokens."""
    keys, size = torch.arange(3000).view(30, 100), case.space.state_size
    noise = dense(case.space.noise(toy_streams(keys)))
    ensure(noise.shape == (*keys.shape, size), f"noise gave {tuple(noise.shape)}.")
    for values, problem in (
        (noise, "is not standard normal"),
        (noise.mean(-1) * size**0.5, "of one token are not independent, by their means"),
        (noise.mean(1) * 10, "of different tokens are not independent, by their means"),
    ):
        slack = 5 / values.numel() ** 0.5
        mean, within = float(values.mean()), [float((values.abs() < bound).float().mean()) for bound in (0.5, 1, 2)]
        far = max(abs(share - normal) for share, normal in zip(within, (0.3829, 0.6827, 0.9545), strict=True))
        ensure(
            abs(mean) <= slack and far <= slack,
            f"The numbers of the noise {problem}: mean {mean:.3g}, shares below 0.5, 1 and 2 of {within}.",
        )


@law
def check_noise_keeps_to_its_streams(case: _Case) -> None:
    """A token's noise comes from its own stream, is new at every call, and is the same alone and beside others."""
    streams = toy_streams(case.tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = dense(case.space.noise(streams))
        ensure(torch.equal(torch.get_rng_state(), before), "noise draws from torch's global generator.")
    ensure(not torch.equal(dense(case.space.noise(streams)), first), "A second call gave the same noise.")
    alone = dense(case.space.noise(toy_streams(case.tokens[_ONE])))
    ensure_close(first[_ONE], alone, "a token's noise must not depend on its batch mates")
