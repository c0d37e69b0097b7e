"""Laws of parametrizations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from l2d_framework.diffusion.logits import dense
from l2d_framework.errors import ConfigError
from l2d_framework.parametrization import Parametrization, ParametrizationConfig
from l2d_framework.testing.assertions import distance, ensure, ensure_close
from l2d_framework.testing.space_noise import check_noise_is_standard_normal, check_noise_keeps_to_its_streams
from l2d_framework.testing.spaces import HIDDEN, VOCAB, built_space, questions
from l2d_framework.testing.toys import ToySchedule, toy_streams


def parametrization_checks(config: ParametrizationConfig) -> Sequence[Callable[[Any], None]]:
    """Laws of every parametrization, and those of sampling-time options where it has any."""
    checks = [
        check_parametrization_shapes,
        check_parametrization_tells_tokens_apart,
        check_estimate_of_onehot_is_encode,
        check_codebook_is_not_stale,
        check_estimate_keeps_to_its_streams,
        check_estimate_is_tokenwise,
        check_prior_is_corruption_at_the_start,
        check_corruption_ends_clean,
        check_corruption_is_tokenwise,
        check_embed_is_finite,
        check_embed_is_tokenwise,
        check_embed_uses_previous_where_declared,
        check_noise_is_standard_normal,
        check_noise_keeps_to_its_streams,
        check_parametrization_is_its_state_dict,
    ]
    space, _ = built_space(config)
    if type(space).refine is not Parametrization.refine:
        checks += [check_refinement_knows_clean_states, check_refinement_is_tokenwise]
    if space.uses_previous:
        checks += [check_no_previous_is_uniform, check_embed_needs_only_what_is_remembered]
    return [*checks, check_estimate_options] if "estimate" in type(config).model_fields else checks


@torch.no_grad()
def check_parametrization_shapes(config: ParametrizationConfig) -> None:
    """States are (B, L, D) in float32, and the prior has a scale."""
    space, table = built_space(config)
    ensure(
        math.isfinite(space.prior_scale) and space.prior_scale > 0, f"prior_scale is {space.prior_scale}, not positive."
    )
    ensure(space.config == config, f"The module's config is {space.config!r}, not the one it was built from.")
    tokens, logits, t = questions()
    for name, x in {
        "encode": space.encode(tokens, table),
        "estimate": space.estimate(logits, t, space.codebook(table), toy_streams(tokens)),
    }.items():
        ensure(
            x.shape == (*tokens.shape, space.state_size) and x.dtype == torch.float32,
            f"{name} gave {tuple(x.shape)} {x.dtype} for tokens {tuple(tokens.shape)} and D = {space.state_size}.",
        )
        ensure(x.isfinite().all(), f"{name} gave numbers that are not finite.")


@torch.no_grad()
def check_parametrization_tells_tokens_apart(config: ParametrizationConfig) -> None:
    """No two tokens share a clean state."""
    space, table = built_space(config)
    clean = space.encode(torch.arange(VOCAB)[None], table)[0]
    gaps = torch.cdist(clean, clean) + torch.eye(VOCAB) * clean.norm(dim=-1).max()
    ensure(gaps.min() > 1e-3 * clean.norm(dim=-1).max(), "encode gives two tokens the same clean state.")


@torch.no_grad()
def check_estimate_of_onehot_is_encode(config: ParametrizationConfig) -> None:
    """A network that is certain of a token moves the state to that token, at every time."""
    space, table = built_space(config)
    tokens, _, _ = questions()
    for time in (0.0, 0.5, 1.0):
        found = space.estimate(
            _certain(tokens), torch.full(tokens.shape, time), space.codebook(table), toy_streams(tokens)
        )
        ensure_close(
            found, space.encode(tokens, table), f"estimate(certain logits) must be encode(tokens) at t = {time}"
        )


@torch.no_grad()
def check_codebook_is_not_stale(config: ParametrizationConfig) -> None:
    """A codebook made once serves any number of estimates, and a fresh one follows every change of the weights."""
    space, table = built_space(config)
    tokens, logits, t = questions()
    kept = space.codebook(table)
    first = space.estimate(logits, t, kept, toy_streams(tokens))
    for codebook, claim in (
        (kept, "a codebook must not be used up"),
        (space.codebook(table), "codebook must not vary"),
    ):
        ensure_close(space.estimate(logits, t, codebook, toy_streams(tokens)), first, claim)
    for weight in space.parameters():
        weight.add_(torch.linspace(-0.3, 0.3, weight.numel()).view_as(weight))
    changed = table.flip(0)
    ensure_close(
        space.estimate(_certain(tokens), t, space.codebook(changed), toy_streams(tokens)),
        space.encode(tokens, changed),
        "codebook must follow the weights and the table",
    )


@torch.no_grad()
def check_estimate_keeps_to_its_streams(config: ParametrizationConfig) -> None:
    """An estimate draws from the streams it is given and from nothing else."""
    space, table = built_space(config)
    tokens, logits, t = questions()
    codebook = space.codebook(table)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = space.estimate(logits, t, codebook, toy_streams(tokens))
        ensure(torch.equal(torch.get_rng_state(), before), "estimate draws from torch's global generator.")
        torch.manual_seed(2)
        ensure_close(
            space.estimate(logits, t, codebook, toy_streams(tokens)), first, "equal streams must give equal estimates"
        )


@torch.no_grad()
def check_estimate_is_tokenwise(config: ParametrizationConfig) -> None:
    """A token's estimate does not depend on what else is in the batch."""
    space, table = built_space(config)
    tokens, logits, t = questions()
    codebook = space.codebook(table)
    together = space.estimate(logits, t, codebook, toy_streams(tokens))
    alone = space.estimate(logits[1:, 1:2], t[1:, 1:2], codebook, toy_streams(tokens[1:, 1:2]))
    ensure_close(together[1:, 1:2], alone, "a token's estimate must not depend on its batch mates")


@torch.no_grad()
def check_prior_is_corruption_at_the_start(config: ParametrizationConfig) -> None:
    """At t = 0 a token has become the prior, whichever token it was."""
    space, table = built_space(config)
    tokens, _, _ = questions()
    start = torch.zeros(tokens.shape)
    prior = dense(space.prior(toy_streams(tokens)))
    for these in (tokens, tokens.flip(1)):
        x = space.corrupt(these, space.noise(toy_streams(tokens)), start, ToySchedule(), table)
        ensure_close(dense(x), prior, "prior must be what corrupt makes of the same noise at t = 0")


@torch.no_grad()
def check_corruption_ends_clean(config: ParametrizationConfig) -> None:
    """At t = 1 no noise is left, and nothing else before."""
    space, table = built_space(config)
    tokens, _, _ = questions()
    clean = dense(space.encode(tokens, table))
    noise = space.noise(toy_streams(tokens))
    x = space.corrupt(tokens, noise, torch.ones(tokens.shape), ToySchedule(), table)
    ensure_close(dense(x), clean, "corrupt must be encode at t = 1")
    x = space.corrupt(tokens, noise, torch.full(tokens.shape, 0.5), ToySchedule(), table)
    ensure(distance(dense(x), clean) > 1e-3, "corrupt leaves every token as it is at t = 0.5.")


@torch.no_grad()
def check_corruption_is_tokenwise(config: ParametrizationConfig) -> None:
    """A token's noisy state depends on its own token, noise and time, and on nothing else."""
    space, table = built_space(config)
    tokens, _, t = questions()
    noise = space.noise(toy_streams(tokens))
    together = dense(space.corrupt(tokens, noise, t, ToySchedule(), table))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = slice(1, 2)
        alone = space.corrupt(tokens[1:, one], noise[1:, one], t[1:, one], ToySchedule(), table)
    ensure_close(together[1:, one], dense(alone), "a token's noisy state must not depend on its batch mates or on dice")


@torch.no_grad()
def check_refinement_knows_clean_states(config: ParametrizationConfig) -> None:
    """Where no noise is left, the state names its token against whatever the network says."""
    space, table = built_space(config)
    tokens, logits, t = questions()
    before = logits.clone()
    found = space.refine(logits, space.encode(tokens, table), torch.ones_like(t), ToySchedule(), table)
    ensure(found.shape == logits.shape and found.isfinite().all(), "refine must give finite logits of the same shape.")
    ensure(torch.equal(logits, before), "refine changes the logits it is given.")
    ensure(torch.equal(found.argmax(-1), tokens), "refine does not know the token of a clean state.")


@torch.no_grad()
def check_refinement_is_tokenwise(config: ParametrizationConfig) -> None:
    """A token's logits depend on its own state and time, and on nothing else."""
    space, table = built_space(config)
    tokens, logits, t = questions()
    x = space.corrupt(tokens, space.noise(toy_streams(tokens)), t, ToySchedule(), table)
    together = space.refine(logits, x, t, ToySchedule(), table)
    alone = space.refine(logits[1:, 1:2], x[1:, 1:2], t[1:, 1:2], ToySchedule(), table)
    ensure_close(together[1:, 1:2], alone, "a token's logits must not depend on its batch mates")


@torch.no_grad()
def check_embed_is_finite(config: ParametrizationConfig) -> None:
    """The network input is (B, L, H) and finite from pure noise to clean states, with and without a previous answer."""
    space, table = built_space(config)
    tokens, logits, _ = questions()
    schedule = ToySchedule()
    noise = space.noise(toy_streams(tokens))
    for time in (0.0, 1e-6, 0.5, 1 - 1e-6, 1.0):
        t = torch.full(tokens.shape, time)
        x = space.corrupt(tokens, noise, t, schedule, table)
        for previous in (None, logits):
            h = space.embed(x, t, schedule, table, previous)
            ensure(h.shape == (*tokens.shape, HIDDEN), f"embed gave {tuple(h.shape)} for H = {HIDDEN}.")
            ensure(h.isfinite().all(), f"embed gave numbers that are not finite at t = {time}.")


@torch.no_grad()
def check_embed_is_tokenwise(config: ParametrizationConfig) -> None:
    """A token's network input does not depend on what else is in the batch."""
    space, table = built_space(config)
    tokens, _, t = questions()
    x = space.prior(toy_streams(tokens))
    together = space.embed(x, t, ToySchedule(), table, None)
    alone = space.embed(x[1:, 1:2], t[1:, 1:2], ToySchedule(), table, None)
    ensure_close(together[1:, 1:2], alone, "a token's network input must not depend on its batch mates")


@torch.no_grad()
def check_embed_uses_previous_where_declared(config: ParametrizationConfig) -> None:
    """The previous answer changes the network input if, and only if, the space declares `uses_previous`."""
    space, table = built_space(config)
    tokens, logits, t = questions()
    x = space.encode(tokens, table)
    without, with_previous = (space.embed(x, t, ToySchedule(), table, previous) for previous in (None, logits))
    effect = distance(with_previous, without)
    ensure(
        (effect > 1e-4) == space.uses_previous,
        f"uses_previous is {space.uses_previous}, but the previous answer changes the network input by {effect:.3g}.",
    )


@torch.no_grad()
def check_no_previous_is_uniform(config: ParametrizationConfig) -> None:
    """No previous answer is the same as one that finds every token equally likely, remembered or not."""
    space, table = built_space(config)
    tokens, logits, t = questions()
    x, zero = space.encode(tokens, table), torch.zeros_like(logits)
    without = space.embed(x, t, ToySchedule(), table, None)
    for previous in (zero, space.remember(zero, table)):
        found = space.embed(x, t, ToySchedule(), table, previous)
        ensure_close(found, without, "no previous answer must equal logits of zero")


@torch.no_grad()
def check_embed_needs_only_what_is_remembered(config: ParametrizationConfig) -> None:
    """What is remembered of an answer serves the network input as well as its logits, and is never taken for logits."""
    space, table = built_space(config)
    tokens, logits, t = questions()
    memory, x = space.remember(logits, table), space.encode(tokens, table)
    ensure(memory.shape[:2] == logits.shape[:2], f"remember gave {tuple(memory.shape)} for {tuple(logits.shape)}.")
    ensure(
        memory.shape[-1] != VOCAB or torch.equal(memory, logits),
        "remember gives something as wide as logits that is not the logits; embed cannot tell it from them.",
    )
    ensure_close(
        space.embed(x, t, ToySchedule(), table, memory),
        space.embed(x, t, ToySchedule(), table, logits),
        "the network input of what is remembered must be that of the logits",
    )


@torch.no_grad()
def check_parametrization_is_its_state_dict(config: ParametrizationConfig) -> None:
    """Two modules of one configuration and one state dict encode and embed alike."""
    (space, table), (other, _) = built_space(config, seed=0), built_space(config, seed=1)
    tokens, logits, t = questions()
    other.load_state_dict(space.state_dict())
    clean = space.encode(tokens, table)
    ensure_close(other.encode(tokens, table), clean, "encode must depend on the state dict only")
    ensure_close(
        other.embed(clean, t, ToySchedule(), table, logits),
        space.embed(clean, t, ToySchedule(), table, logits),
        "embed must depend on the state dict only",
    )


def check_estimate_options(config: ParametrizationConfig) -> None:
    """Other sampling-time options share every weight, and a misspelt one is refused."""
    space, _ = built_space(config)
    other = space.with_estimate(config.to_json()["estimate"])
    ensure(other.config == config, f"Repeating the options changed the config to {other.config!r}.")
    pairs = zip(space.parameters(), other.parameters(), strict=True)
    ensure(all(a is b for a, b in pairs), "with_estimate must share the weights, not copy them.")
    ensure(_refuses(space, {"no_such_option": 1}), 'with_estimate accepts the unknown option "no_such_option".')


def _refuses(space: Parametrization, options: dict[str, Any]) -> bool:
    try:
        space.with_estimate(options)
    except ConfigError:
        return True
    return False


def _certain(tokens: Tensor) -> Tensor:
    return 1e4 * torch.nn.functional.one_hot(tokens, VOCAB).float()
