"""The `sampling` section and how presets, checkpoints and requests combine into it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, Union, cast

from pydantic import ConfigDict, Field, SerializeAsAny

from l2d_framework.component import Component, merged
from l2d_framework.config.sections import Section, optional, specialised
from l2d_framework.config.validation import refuse_unknown, validated
from l2d_framework.errors import ConfigError, L2DError, shown
from l2d_framework.registry import INTERFACES, Registry, declared, registry

if TYPE_CHECKING:
    from l2d_framework.guidance import Guidance
    from l2d_framework.parametrization import ParametrizationConfig
    from l2d_framework.solver import Solver
else:
    # The interfaces import torch; `sampling_type` puts the installed components here.
    Guidance = Solver = Component

_MOST = 1_000_000
"""Largest number of evaluations or tokens, so that a slip of the keyboard does not fill the memory."""


_PATHS = {True: "alpha * clean + sigma * noise", False: "of another corruption than Gaussian noise"}


class SamplingSection(Section):
    """How to sample; everything left out comes from the preset."""

    model_config = ConfigDict(json_schema_extra=optional("solver"))

    preset: str | None = None
    """Named settings below the explicit ones; the method's when None."""
    num_inference_steps: int | None = Field(default=None, ge=0, le=_MOST)
    """Network evaluations per token, the read-out included; 0 is the plain language model. More cost time and may find
    better answers: `l2d diagnose` says whether. Upper limit for a solver that chooses its own steps."""
    solver: SerializeAsAny[Solver]
    """How the state moves from noise to data: `{name: midpoint}` and others with steps on a grid, or one such as
    `fehlberg2` in which each token chooses its own."""
    end_time: float | None = Field(default=None, gt=0, le=1)
    """Time of the read-out, 1 being data; the solver's grid ends there."""
    guidance: list[SerializeAsAny[Guidance]] = Field(default_factory=list)
    """Wrappers around each prediction, the first of them innermost; none when empty."""
    estimate: dict[str, Any] = Field(default_factory=dict)
    """Fields of the parametrization's `estimate`, such as {mode: argmax}; those of the checkpoint where left out."""
    seed: int = Field(default=0, ge=0)
    """Of all noise of a request; another seed gives other answers."""
    block_size: int | None = Field(default=None, ge=1, le=_MOST)
    """Tokens denoised together; the trained number when None, and at most that."""
    patience: int | None = Field(default=None, ge=1, le=_MOST)
    """Evaluations in which no token has changed, after which a row stops; never when None. Saves time on whole
    answers."""

    def resolve(self, parametrization: ParametrizationConfig, user: Mapping[str, Any]) -> SamplingSection:
        """Settings of a request: the user's options over this section, a component as instance, section or name.

        A preset among the options replaces this section except for its seed and, unless the preset has its own, its
        guidance. A solver among them leaves what belongs to the steps of the one before, where it cannot use it.
        Instances are taken as they are, so that no plugin need offer their classes.
        """
        user = _request(user)
        own = data = self.model_dump(mode="json")
        if user.get("preset") is not None:
            kept = {name: own[name] for name in ("guidance", "seed")}
            data = merged(kept, registry().preset(user["preset"]))
        found = _laid_over(data, user, self.solver if data is own else None)
        # What nobody asks to change stays the same object.
        found |= {name: getattr(self, name) for name in ("solver", "guidance") if found[name] is own[name]}
        made: dict[str, Any] = {}
        if data is own and isinstance(found["solver"], dict) and found["solver"]["name"] == own["solver"]["name"]:
            found["solver"] = validated(type(self.solver), found["solver"], "sampling.solver")
        if _has_instances(found["solver"]):
            made["solver"], found["solver"] = found["solver"], None
        if _has_instances(found["guidance"]):
            made["guidance"] = [_made("guidance", entry) for entry in found.pop("guidance")]
        kind = _open_type(registry()) if "solver" in made else sampling_type(registry())
        changed = self.model_copy(update=dict(validated(kind, found, "sampling")) | made)
        return complete(changed, parametrization)


@cache
def sampling_type(plugins: Registry | None) -> type[SamplingSection]:
    """Sampling section whose solver and guidance are unions over plugins, or anything while none are loaded."""
    guidance: Any = list[SerializeAsAny[component_type(plugins, "guidance")]]  # type: ignore[misc]
    solver: Any = SerializeAsAny[component_type(plugins, "solver")]  # type: ignore[misc]
    return specialised(SamplingSection, solver=(solver, ...), guidance=(guidance, Field(default_factory=list)))


@cache
def _open_type(plugins: Registry) -> type[SamplingSection]:
    """Sampling section that says nothing of its solver."""
    return specialised(sampling_type(plugins), solver=(None, ...))


def component_type(plugins: Registry | None, kind: str) -> Any:
    """Union of the components of a kind, told apart by `name`; anything while no plugins are loaded."""
    if plugins is None:
        return Any
    components = tuple(plugins.components(kind).values())
    if len(components) > 1:
        return Annotated[cast(Any, Union[components]), Field(discriminator="name")]  # noqa: UP007 -- known at run time
    return components[0] if components else Component


def with_preset(sampling: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """Raw sampling section laid over its preset.

    A section that leaves nothing out needs no preset, so resolved run files outlive the plugins that named one.
    """
    if is_complete(sampling):
        return dict(sampling)
    preset = sampling.get("preset")
    if preset is None and method is not None:
        settings = registry().method(method).get("sampling", {})
        preset = settings.get("preset")
        sampling = merged({name: value for name, value in settings.items() if name != "preset"}, sampling)
    if not isinstance(preset, str):
        return dict(sampling)
    return _laid_over(registry().preset(preset), sampling) | {"preset": preset}


def is_complete(sampling: Mapping[str, Any]) -> bool:
    """Whether a raw sampling section leaves nothing out."""
    return set(SamplingSection.model_fields) <= set(sampling)


def component_of(kind: str, value: Any) -> Any:
    """A component that is given as itself, as its section or by its name; None where that is given."""
    if value is None or (isinstance(value, Component) and value.kind == kind):
        return value
    section = _component_data(kind, value)
    if not isinstance(section, Mapping):
        raise ConfigError(f"{kind} should be a name, a section or a component of this kind, got {shown(value)}.")
    return registry().create(kind, section)


def check_request(options: Mapping[str, Any]) -> None:
    """Refuse a request's unknown fields and names while that costs no torch, where plugins declare their names."""
    names = declared()
    if not names.knows_all:
        return
    options = _request(options)
    if options.get("preset") is not None:
        names.check_name("preset", options["preset"])
    refuse_unknown(sampling_type(None), options, "sampling", names)


def parse_sampling(data: Mapping[str, Any]) -> SamplingSection:
    """Sampling section from a checkpoint's manifest."""
    return validated(sampling_type(registry()), data, "sampling")


def default_sampling(parametrization: ParametrizationConfig) -> SamplingSection:
    """Sampling section of a run file that says nothing of sampling."""
    return complete(parse_sampling(with_preset({}, parametrization.default_method)), parametrization)


def complete(sampling: SamplingSection, parametrization: ParametrizationConfig) -> SamplingSection:
    """Sampling section with every field of `estimate`, checked against its solver and this against the state space."""
    steps, solver = sampling.num_inference_steps, sampling.solver
    if solver.gaussian_path != parametrization.gaussian_path:
        mover, space = solver.component_name(), parametrization.component_name()
        found = cast("dict[str, type[Solver]]", registry().components("solver"))
        others = [name for name, other in found.items() if other.gaussian_path == parametrization.gaussian_path]
        raise ConfigError(
            f"sampling.solver: {mover!r} moves states {_PATHS[solver.gaussian_path]}, and those of parametrization "
            f"{space!r} are {_PATHS[parametrization.gaussian_path]}; use one of {others}"
        )
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
    from l2d_framework.parametrization import merge_estimate

    try:
        estimate = merge_estimate(parametrization, sampling.estimate).to_json()["estimate"]
    except ConfigError as error:
        raise ConfigError(f"sampling.estimate: {error}") from error
    return sampling.model_copy(update={"estimate": estimate})


def _laid_over(
    settings: Mapping[str, Any], changes: Mapping[str, Any], solver_before: Solver | None = None
) -> dict[str, Any]:
    """Settings with changes; one that names another solver drops what was said of the steps of the one before."""
    # Evaluations of a fixed grid are not the budget of a solver that chooses its steps, nor the other way round; such a
    # solver has no grid on which patience could count, and not all can end at time 1.
    before, solver = (_solver(one) for one in (solver_before or settings.get("solver"), changes.get("solver")))
    unfit: list[str] = []
    if before and solver and before.component_name() != solver.component_name():
        unfit += ["num_inference_steps"] if before.is_adaptive != solver.is_adaptive else []
        unfit += ["patience"] if solver.is_adaptive else []
        unfit += ["end_time"] if solver.evaluates_end and settings.get("end_time") == 1.0 else []
    return merged({name: value for name, value in settings.items() if name not in unfit}, changes)


def _solver(section: Any) -> Solver | None:
    """The solver of a section; None where it is missing or wrong, which whoever validates it will say."""
    try:
        return cast(Solver, _made("solver", section)) if isinstance(section, Component | Mapping) else None
    except L2DError:
        return None


def _made(kind: str, section: Any) -> Component:
    return section if isinstance(section, Component) else registry().create(kind, section)


def _request(user: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(user)
    if "solver" in options:
        options["solver"] = _component_data("solver", options["solver"])
    if isinstance(options.get("guidance"), list | tuple):
        options["guidance"] = [_component_data("guidance", entry) for entry in options["guidance"]]
    elif isinstance(options.get("guidance"), Component | type | str | Mapping):
        raise ConfigError(f"sampling.guidance: should be a list, got {shown(options['guidance'])}; put it into one")
    for name, value in options.items():
        if _has_instances(value):
            continue
        # Numbers and arrays of numpy and torch turn into Python's own.
        try:
            options[name] = json.loads(json.dumps(value, default=lambda number: number.tolist()))
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"sampling.{name}: should be numbers, texts, lists and sections, got {value!r}"
            ) from error
    if not isinstance(options.get("preset", ""), str | None):
        raise ConfigError(f"sampling.preset: should be the name of a preset, got {options['preset']!r}")
    return options


def _has_instances(value: Any) -> bool:
    return any(isinstance(entry, Component) for entry in (value if isinstance(value, list) else [value]))


def _component_data(kind: str, value: Any) -> Any:
    if isinstance(value, type) and issubclass(value, Component):
        raise ConfigError(f"{kind} should be a component, got the class {value.__name__}; pass {value.__name__}(...)")
    if isinstance(value, Component) and not isinstance(value, resolve_name(INTERFACES[kind])):
        raise ConfigError(f"{kind} should be a component of this kind, got {shown(value)}, a {value.kind or 'section'}")
    return {"name": value} if isinstance(value, str) else value
