"""The `sampling` section and how presets, checkpoints and requests combine into it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Union, cast

from pydantic import ConfigDict, Field, SerializeAsAny, create_model

from l2d_framework.component import Component, merged
from l2d_framework.config.sections import Section
from l2d_framework.config.validation import validated
from l2d_framework.errors import ConfigError
from l2d_framework.guidance import Guidance
from l2d_framework.parametrization import ParametrizationConfig, merge_estimate
from l2d_framework.registry import Registry, registry
from l2d_framework.solver import Solver


def _solver_is_optional(schema: dict[str, Any]) -> None:
    schema["required"] = [name for name in schema.get("required", []) if name != "solver"]


class SamplingSection(Section):
    """How to sample; everything left out comes from the preset."""

    model_config = ConfigDict(json_schema_extra=_solver_is_optional)

    preset: str | None = None
    """Named settings below the explicit ones; the parametrization's default preset when None."""
    num_inference_steps: int | None = Field(default=None, ge=0)
    """Network evaluations per token, the read-out included; 0 is the plain language model."""
    solver: SerializeAsAny[Solver]
    end_time: float | None = Field(default=None, gt=0, le=1)
    """Time of the read-out."""
    guidance: list[SerializeAsAny[Guidance]] = Field(default_factory=list)
    estimate: dict[str, Any] = Field(default_factory=dict)
    """Fields of the parametrization's `estimate`."""
    seed: int = Field(default=0, ge=0)
    block_size: int | None = Field(default=None, ge=1)
    """Tokens denoised together; the model's own number when None."""
    patience: int | None = Field(default=None, ge=1)
    """Stop once no token has changed in this many evaluations."""

    def resolve(self, parametrization: ParametrizationConfig, user: Mapping[str, Any]) -> SamplingSection:
        """Settings of a request: the user's options over this section.

        A preset among the options replaces this section except for its seed and, unless the preset has its own, its
        guidance.

        Args:
            parametrization: the state space, whose `estimate` section holds what nobody chose.
            user: fields of a sampling section; a component may be an instance, a section or just a name.

        Returns:
            Complete settings.

        Raises:
            ConfigError: if an option is unknown, out of range or impossible for the solver.
            PluginError: if there is no such preset.
        """
        user = _request(user)
        data = self.model_dump(mode="json")
        if user.get("preset") is not None:
            kept = {name: data[name] for name in ("guidance", "seed")}
            data = merged(kept, registry().preset(user["preset"]))
        return complete(parse_sampling(merged(data, user)), parametrization)


@cache
def sampling_type(plugins: Registry) -> type[SamplingSection]:
    """Sampling section whose solver and guidance are unions over plugins.

    Args:
        plugins: what is installed.

    Returns:
        A subclass of `SamplingSection`, the same at every call.
    """
    guidance: Any = list[component_type(plugins, "guidance", Guidance)]  # type: ignore[misc]
    return create_model(
        "SamplingSection",
        __base__=SamplingSection,
        __doc__=SamplingSection.__doc__,
        solver=(component_type(plugins, "solver", Solver), ...),
        guidance=(guidance, Field(default_factory=list)),
    )


def component_type(plugins: Registry, kind: str, interface: Any) -> Any:
    """Type of a field that holds any component of one kind.

    Args:
        plugins: what is installed.
        kind: the kind.
        interface: its interface.

    Returns:
        The union of the components, told apart by `name`; the interface itself while none is installed.
    """
    components = tuple(plugins.components(kind).values())
    if len(components) > 1:
        return Annotated[cast(Any, Union[components]), Field(discriminator="name")]  # noqa: UP007 -- known at run time
    return components[0] if components else interface


def with_preset(sampling: Mapping[str, Any], default: str | None) -> dict[str, Any]:
    """Raw sampling section laid over its preset.

    A section that leaves nothing out needs no preset, so resolved run files outlive the plugins that named one.

    Args:
        sampling: what the run file says.
        default: preset to use when it names none.

    Returns:
        The section with the preset's values where it has none.

    Raises:
        PluginError: if there is no such preset.
    """
    preset = sampling.get("preset") or default
    if not isinstance(preset, str) or set(SamplingSection.model_fields) <= set(sampling):
        return dict(sampling)
    return merged(registry().preset(preset), sampling) | {"preset": preset}


def parse_sampling(data: Mapping[str, Any]) -> SamplingSection:
    """Sampling section from a checkpoint's manifest.

    Args:
        data: what `model_dump` wrote.

    Returns:
        The section.
    """
    return validated(sampling_type(registry()), data, "sampling")


def default_sampling(parametrization: ParametrizationConfig) -> SamplingSection:
    """Sampling section of a run file that says nothing of sampling.

    Args:
        parametrization: the state space, which names its default preset.

    Returns:
        Complete settings.
    """
    return complete(parse_sampling(with_preset({}, parametrization.default_preset)), parametrization)


def complete(sampling: SamplingSection, parametrization: ParametrizationConfig) -> SamplingSection:
    """Sampling section with every field of `estimate`, checked against its solver.

    Args:
        sampling: the section.
        parametrization: the state space its estimate belongs to.

    Returns:
        The completed section.

    Raises:
        ConfigError: if an estimate option is wrong or the solver cannot make this number of evaluations.
    """
    steps, solver = sampling.num_inference_steps, sampling.solver
    if steps is None and not solver.is_adaptive:
        raise ConfigError(
            f"sampling.num_inference_steps: solver {solver.component_name()!r} needs a number, got None; set it, or "
            "name a preset"
        )
    if steps:
        try:
            solver.grid_size(steps)
        except ConfigError as error:
            raise ConfigError(f"sampling.num_inference_steps: {error}") from error
    if not sampling.estimate and "estimate" not in type(parametrization).model_fields:
        return sampling
    try:
        estimate = merge_estimate(parametrization, sampling.estimate).to_json()["estimate"]
    except ConfigError as error:
        raise ConfigError(f"sampling.estimate: {error}") from error
    return sampling.model_copy(update={"estimate": estimate})


def _request(user: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(user)
    if "solver" in options:
        options["solver"] = _component_data(options["solver"])
    if isinstance(options.get("guidance"), list | tuple):
        options["guidance"] = [_component_data(entry) for entry in options["guidance"]]
    return options


def _component_data(value: Any) -> Any:
    if isinstance(value, Component):
        return value.to_json()
    return {"name": value} if isinstance(value, str) else value
