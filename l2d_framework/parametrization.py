"""Parametrization: the state space in which tokens are diffused."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from l2d_framework.component import Component, merged
from l2d_framework.errors import ConfigError
from l2d_framework.schedule import NoiseLaw
from l2d_framework.types import Random, Stride


class ParametrizationConfig(Component):
    """Configuration of a state space; `build` makes the module that owns the projection weights.

    Choices that only matter when sampling live in a field called `estimate`, so that they can be changed per request.
    """

    kind: ClassVar[str] = "parametrization"
    default_method: ClassVar[str | None] = None
    """Method whose block size, padding and sampling a run file that leaves them out gets."""
    gaussian_path: ClassVar[bool] = True
    """Whether noisy states are alpha(t) * clean + sigma(t) * prior_scale * noise, as `Parametrization.corrupt` has it;
    False where it is overridden with another corruption, whose solvers move by other rules than a slope."""

    @abstractmethod
    def build(self, vocab_size: int, hidden_size: int) -> Parametrization:
        """Make the module.

        Args:
            vocab_size: V, rows of the backbone's embedding table.
            hidden_size: H, width of the backbone.

        Returns:
            The state space with freshly initialised weights.
        """


class Parametrization(nn.Module, ABC):
    """The state space: owns D, the prior's scale and the projection weights.

    A state as wide as the vocabulary is best a tensor subclass with a method `dense`, which holds tokens and seeds
    instead of numbers, such as the simplex's `WideState`.

    Attributes:
        config: the component this module was built from.
        state_size: D.
        prior_scale: standard deviation of the noise at t = 0.
    """

    uses_previous: bool = False
    """True when `embed` reads the previous evaluation's logits: training then shows them to a share of the examples
    and generation always does (self-conditioning, Chen et al. 2022, arXiv:2208.04202)."""

    state_dtype: ClassVar[torch.dtype] = torch.float32
    """Type of the state between evaluations; the network always sees float32."""

    config: ParametrizationConfig
    state_size: int
    prior_scale: float

    @abstractmethod
    def encode(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Clean states of tokens.

        Args:
            tokens: ids, (B, L), int64.
            table: the backbone's embedding table, (V, H).

        Returns:
            (B, L, D), float32.
        """

    @abstractmethod
    def embed(self, x: Tensor, t: Tensor, schedule: NoiseLaw, table: Tensor, previous: Tensor | None) -> Tensor:
        """Network input for noisy states.

        Args:
            x: (B, L, D), float32.
            t: (B, L), float32.
            schedule: the noise law, for rescaling.
            table: the backbone's embedding table, (V, H).
            previous: logits of the previous evaluation, (B, L, V), what `remember` made of them, or None, which means
                the same as logits of zero.

        Returns:
            (B, L, H).
        """

    @abstractmethod
    def estimate(self, logits: Tensor, t: Tensor, codebook: Tensor, random: Random) -> Tensor:
        """Clean state the solver is to move towards.

        Args:
            logits: (B, L, V), float32.
            t: time that temperature schedules read, (B, L): what `lookahead` made of the evaluation's.
            codebook: what `codebook` returned.
            random: streams for estimates that draw.

        Returns:
            (B, L, D), float32.
        """

    def lookahead(self, t: Tensor, stride: Stride) -> Tensor:
        """Time whose temperature an estimate has.

        Args:
            t: time of the evaluation, (B, L), float.
            stride: the move that the estimate is for.

        Returns:
            (B, L); `t` itself, unless a method anneals ahead of the state.
        """
        return t

    def noise(self, random: Random) -> Tensor:
        """Standard normal noise of a state.

        Args:
            random: one stream per token.

        Returns:
            (B, L, D), float32.
        """
        return random.normal(self.state_size)

    def prior(self, random: Random) -> Tensor:
        """State at t = 0, from which sampling starts: what `corrupt` makes of any token there.

        Args:
            random: one stream per token.

        Returns:
            (B, L, D), float32; the noise times the prior's scale unless a space has another corruption.
        """
        return self.prior_scale * self.noise(random)

    def corrupt(self, tokens: Tensor, noise: Tensor, t: Tensor, schedule: NoiseLaw, table: Tensor) -> Tensor:
        """Noisy states of tokens.

        Args:
            tokens: ids, (B, L), int64.
            noise: standard normal, (B, L, D), float32; what `noise` made or any tensor.
            t: times, (B, L), float32.
            schedule: the noise law.
            table: the backbone's embedding table, (V, H).

        Returns:
            (B, L, D), float32; alpha(t) * clean + sigma(t) * prior_scale * noise unless a space has another corruption,
            which is then the prior at t = 0 and `encode` at t = 1, and whose config declares `gaussian_path = False`.
        """
        return schedule.interpolate(self.encode(tokens, table), self.prior_scale * noise, t)

    @property
    def refines(self) -> bool:
        """Whether `refine` changes anything; where it does, generation holds the logits of a whole block."""
        return type(self).refine is not Parametrization.refine

    def refine(self, logits: Tensor, x: Tensor, t: Tensor, schedule: NoiseLaw, codebook: Tensor) -> Tensor:
        """Logits after what the state itself says of its token; the network then learns the rest.

        A token that the corruption left as it was is so never mistaken, in the loss, between evaluations or in the
        read-out. In training no gradient reaches state or codebook through this, only the logits.

        Args:
            logits: of some positions, (B, n, V), float32.
            x: their states, (B, n, D), float32.
            t: their times, (B, n), float32.
            schedule: the noise law.
            codebook: what `codebook` returned.

        Returns:
            (B, n, V), float32; the logits as they are unless a space knows better.
        """
        return logits

    def remember(self, logits: Tensor, table: Tensor) -> Tensor:
        """What `embed` will need of logits that are too many to keep.

        Args:
            logits: of some positions, (B, n, V), float32.
            table: the backbone's embedding table, (V, H).

        Returns:
            (B, n, M), where M is not V unless these are the logits themselves, which is the default.
        """
        return logits

    def codebook(self, table: Tensor) -> Tensor:
        """Whatever `estimate` and `refine` need that depends on weights only; computed once per generation.

        Args:
            table: the backbone's embedding table, (V, H).

        Returns:
            The table itself unless a parametrization needs more.
        """
        return table

    def with_estimate(self, options: dict[str, Any]) -> Self:
        """The same space and weights with other sampling-time choices.

        Args:
            options: fields of the `estimate` section to change.

        Returns:
            A module that shares every weight with this one.

        Raises:
            ConfigError: if an option is unknown or out of range.
        """
        if not options:
            return self
        other = copy.copy(self)
        other.config = merge_estimate(self.config, options)
        return other


def merge_estimate(config: ParametrizationConfig, options: dict[str, Any]) -> ParametrizationConfig:
    """Parametrization config with some fields of its `estimate` section replaced.

    Args:
        config: the config to start from.
        options: fields to change; nested sections are merged, unless they name another choice.

    Returns:
        The validated result.

    Raises:
        ConfigError: if an option is unknown or out of range.
    """
    data = config.to_json()
    if "estimate" not in data:
        raise ConfigError(f"Parametrization {data['name']!r} has no estimate options; got {options}. Remove them.")
    data["estimate"] = merged(data["estimate"], options)
    try:
        return type(config).model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors())
        raise ConfigError(f"Bad estimate options for parametrization {data['name']!r}: {problems}.") from error
