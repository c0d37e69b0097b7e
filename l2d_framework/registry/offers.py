"""What one entry point offers, such as components and presets, each checked before anybody may ask for it."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pluggy
import typer

from l2d_framework import hooks
from l2d_framework.errors import PluginError, suggest

INTERFACES = {
    "schedule": "l2d_framework.schedule:ScheduleConfig",
    "parametrization": "l2d_framework.parametrization:ParametrizationConfig",
    "backbone": "l2d_framework.backbone:BackboneConfig",
    "solver": "l2d_framework.solver:Solver",
    "guidance": "l2d_framework.guidance:Guidance",
    "drafter": "l2d_framework.drafter:Drafter",
}
"""Where the interface of each kind lives; named rather than imported, because the interfaces import torch."""
PRESET = "preset"
METHOD = "method"
CONVERTER = "converter"
COMMAND = "command"
TASKS = "tasks"
DECLARED = (*INTERFACES, METHOD, PRESET, CONVERTER)
"""Kinds whose names a plugin can declare in its metadata."""

_EXTENDING = ("l2d_commands", "l2d_tasks")
_HOOKS = ("l2d_components", "l2d_presets", "l2d_methods", "l2d_converters", *_EXTENDING)


@dataclass(frozen=True)
class Source:
    """Where a plugin comes from: its entry point, and its distribution, which may be "unknown" with version ""."""

    plugin: str
    distribution: str
    version: str

    @property
    def shipped(self) -> str:
        """Distribution and version."""
        return f"{self.distribution} {self.version}".strip()

    def __str__(self) -> str:
        return f"{self.plugin!r} ({self.shipped})"


@dataclass(frozen=True)
class Offer:
    """Something offered and where it comes from."""

    kind: str
    """Interface of a component, else what it is, such as "preset"."""
    name: str
    value: Any
    """The component class, the preset's fields, the converter, the typer app or the folder of tasks."""
    source: Source


def source_of(entry_point: EntryPoint) -> Source:
    """Where an entry point comes from, without loading it."""
    distribution = entry_point.dist
    name, version = (distribution.name, distribution.version) if distribution else ("unknown", "")
    return Source(entry_point.name, name, version)


def offers_of(entry_point: EntryPoint, group: str) -> list[Offer]:
    """Load an entry point and check everything it offers; loading may raise anything."""
    # A manager of its own keeps one plugin's raising or misspelt hook from aborting the calls of all others.
    manager = pluggy.PluginManager(hooks.GROUP)
    manager.add_hookspecs(hooks)
    plugin = entry_point.load()
    manager.register(plugin, name=entry_point.name)
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        if not caller.has_spec():
            raise PluginError(unknown("hook", caller.name, _HOOKS))
        home = hooks.EXTENSIONS if caller.name in _EXTENDING else hooks.GROUP
        if home != group:
            raise PluginError(f"Hook {caller.name!r} is read from the entry-point group {home!r}, not from {group!r}.")
    if not callers:
        raise PluginError(f"No function is decorated with @hookimpl. Implement {' or '.join(_HOOKS)}.")
    offers = list(_answers(manager, source_of(entry_point)))
    names = [(offer.kind, offer.name) for offer in offers]
    for kind, name in names:
        if names.count((kind, name)) > 1:
            raise PluginError(f"{kind.capitalize()} {name!r} is offered twice. Rename one.")
    return offers


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One line about a name that does not exist, with the closest and all known names."""
    known = list(known)
    return f"Unknown {what} {name!r}{suggest(name, known) or '.'} Available: {', '.join(known) or 'none'}."


def _answers(manager: pluggy.PluginManager, source: Source) -> Iterator[Offer]:
    for classes in manager.hook.l2d_components():
        for component in classes:
            yield Offer(_kind(component), component.component_name(), component, source)
    for kind, hook, fits, rule in _NAMED:
        for offered in getattr(manager.hook, hook)():
            for name, value in offered.items():
                if not isinstance(name, str) or not fits(value):
                    raise PluginError(f"{kind.capitalize()} {name!r} must {rule}, got {value!r}.")
                yield Offer(kind, name, value, source)
    for folder in manager.hook.l2d_tasks():
        if not isinstance(folder, Path) or not folder.is_dir():
            raise PluginError(f"l2d_tasks must return a folder that exists, as a Path, got {folder!r}.")
        yield Offer(TASKS, source.plugin, folder, source)


def _is_section(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_app(value: object) -> bool:
    # The second half refuses an app without commands.
    return isinstance(value, typer.Typer) and bool(typer.main.get_command(value))


_NAMED: tuple[tuple[str, str, Callable[[object], bool], str], ...] = (
    (PRESET, "l2d_presets", _is_section, "hold the fields of a sampling section"),
    (METHOD, "l2d_methods", _is_section, "hold fields of a diffusion run"),
    (CONVERTER, "l2d_converters", callable, "be a function that reads a folder"),
    (COMMAND, "l2d_commands", _is_app, "be a typer.Typer"),
)


def _kind(component: object) -> str:
    from l2d_framework.component import Component

    if not isinstance(component, type):
        raise PluginError(f"l2d_components must return classes, got {component!r}. Return the class, not an instance.")
    interfaces = {kind: pkgutil.resolve_name(path) for kind, path in INTERFACES.items()}
    kinds = [kind for kind, interface in interfaces.items() if issubclass(component, interface)]
    if not issubclass(component, Component) or len(kinds) != 1:
        names = ", ".join(interface.__name__ for interface in interfaces.values())
        raise PluginError(f"{component.__qualname__} must inherit from exactly one of {names}.")
    if inspect.isabstract(component):
        missing = ", ".join(sorted(component.__abstractmethods__))
        raise PluginError(f"{component.__qualname__} is abstract. Implement {missing}.")
    name = component.model_fields.get("name")
    if name is None or get_origin(name.annotation) is not Literal or get_args(name.annotation) != (name.default,):
        raise PluginError(f'{component.__qualname__} needs a field `name: Literal["..."] = "..."`.')
    # A field that has no JSON schema, or a forward reference nobody resolves, would spoil the run files of all plugins,
    # and a list of requirements that cannot be read their table.
    component.model_json_schema()
    component.missing_requirements()
    return kinds[0]
