"""The catalog of installed plugins.

A plugin that fails to load, misspells a hook or offers something malformed is kept out as a whole and remembered in
`broken`; it never hurts the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from l2d_framework.errors import ConfigError, PluginError, install, suggest
from l2d_framework.hooks import EXTENSIONS, GROUP
from l2d_framework.registry.modules import untouched_modules
from l2d_framework.registry.offers import (
    COMMAND,
    CONVERTER,
    DECLARED,
    INTERFACES,
    METHOD,
    PRESET,
    TASKS,
    Offer,
    Source,
    offers_of,
    source_of,
    unknown,
)

if TYPE_CHECKING:  # `l2d --help` asks for extensions, and has no time for pydantic
    from l2d_framework.component import Component

T = TypeVar("T")

BUILTIN_DISTRIBUTION = "l2d-framework"
ALLOW_LIST = "L2D_PLUGINS"
"""Environment variable with the comma-separated entry points to load besides the built-in ones; empty for none."""


_AS_OBJECTS = ("solver", "guidance", "drafter")
"""Kinds that a request takes as objects."""


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that was kept out, and what went wrong."""

    distribution: str
    version: str
    error: str


@dataclass(frozen=True)
class PluginRow:
    """One line of the table of plugins."""

    kind: str
    """Interface, "preset" and the like; "" for a plugin that was kept out, which `name` then names."""
    name: str
    distribution: str
    version: str
    status: Literal["ok", "clash", "undeclared", "missing extra", "broken", "disabled"]
    error: str = ""


class Registry:
    """What the installed plugins offer."""

    def __init__(self) -> None:
        # Plugins that were kept out, by entry point, and those that `L2D_PLUGINS` leaves out.
        self.broken: dict[str, BrokenPlugin] = {}
        self.disabled: list[Source] = []
        # False where a plugin does not declare its names, so that one not found here may be its.
        self.knows_all = True
        self._loaded: set[str] = set()
        self._offers: dict[tuple[str, str], list[Offer]] = {}

    @classmethod
    def load(cls, entry_points: Iterable[EntryPoint] | None = None, group: str = GROUP) -> Registry:
        """Load plugins, by default those that are installed; each is then either loaded, disabled or broken."""
        registry = cls()
        allowed = _allow_list()
        installed = metadata.entry_points(group=group) if entry_points is None else entry_points
        # The built-in ones first, before anybody else's code has run.
        for entry_point in sorted(installed, key=lambda entry: not _is_builtin(source_of(entry))):
            registry._add(entry_point, allowed, group)
        missing = (allowed or set()) - registry._loaded - set(registry.broken)
        if missing:  # else every start would read what is installed once more
            missing -= {entry.name for entry in metadata.entry_points(group=EXTENSIONS if group == GROUP else GROUP)}
        for name in sorted(missing):
            error = f"{ALLOW_LIST} names it, but no installed distribution has such an entry point."
            registry.broken[name] = BrokenPlugin("not installed", "", error)
        return registry

    @classmethod
    def declared(cls) -> Registry:
        """What the installed plugins say in their metadata that they offer: names alone, and nothing is imported.

        Entry points of the groups `l2d_framework.solver`, `l2d_framework.preset` and so on name what a plugin offers;
        their values are that of the plugin's own entry point.

        Returns:
            A registry in which names can be looked up.
        """
        registry = cls()
        allowed = _allow_list()
        everything = metadata.entry_points()
        declarations = [(kind, entry) for kind in DECLARED for entry in everything.select(group=f"{GROUP}.{kind}")]
        for entry_point in everything.select(group=GROUP):
            source = source_of(entry_point)
            if registry._is_left_out(source, allowed):
                continue
            registry._loaded.add(source.plugin)
            # One distribution's entry points share it as an object; its name would have to be parsed for each.
            own = [
                (kind, e.name)
                for kind, e in declarations
                if e.value == entry_point.value and e.dist is entry_point.dist
            ]
            registry.knows_all &= bool(own)
            for kind, name in own:
                registry._offers.setdefault((kind, name), []).append(Offer(kind, name, None, source))
        extensions = {entry_point.name for entry_point in everything.select(group=EXTENSIONS)}
        registry.knows_all &= not (allowed or set()) - registry._loaded - extensions
        return registry

    def check_name(self, kind: str, name: str) -> None:
        """PluginError if the name cannot be one; says nothing about whether what it names can be used."""
        if self.knows_all:
            self._find(kind, name, self._unique(kind))

    def names(self, kind: str) -> list[str]:
        """Names of a kind of offer, such as "preset", sorted; those offered twice are left out."""
        return list(self._unique(kind))

    def kinds(self) -> tuple[str, ...]:
        """Names of the interfaces a component can implement, in the order of a run file."""
        return tuple(INTERFACES)

    def components(self, kind: str) -> dict[str, type[Component]]:
        """Components by name, sorted, also those whose extra is missing; PluginError for an unknown kind."""
        if kind not in INTERFACES:
            raise PluginError(unknown("kind of plugin", kind, INTERFACES))
        return self._unique(kind)

    def get(self, kind: str, name: str) -> type[Component]:
        """One component, ready to use; PluginError if it is unknown, offered twice, or its extra is not installed."""
        component = self._find(kind, name, self.components(kind))
        if component.missing_requirements():
            raise PluginError(_missing_extra(component))
        return component

    def create(self, kind: str, data: Mapping[str, Any]) -> Component:
        """Make a component from its section of a run file; PluginError or ConfigError if that cannot be."""
        name = data.get("name")
        if not isinstance(name, str):
            known = ", ".join(self.components(kind))
            raise ConfigError(f"A {kind} needs a `name`, got {dict(data)}. Available: {known}.")
        from pydantic import ValidationError

        component = self.get(kind, name)
        try:
            text = json.dumps(dict(data))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"Bad {kind} {name!r}: its fields should be numbers, texts, lists and sections, got {dict(data)}."
            ) from error
        try:
            return component.model_validate_json(text)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
            raise ConfigError(f"Bad {kind} {name!r}: {wrong}. Fields: {', '.join(component.model_fields)}.") from error

    def presets(self) -> dict[str, Mapping[str, Any]]:
        """Named `sampling` sections, sorted; names offered twice are left out."""
        return self._unique(PRESET)

    def preset(self, name: str) -> Mapping[str, Any]:
        """Fields of a `sampling` section; PluginError if the name is unknown or offered twice."""
        return self._find(PRESET, name, self.presets())

    def methods(self) -> dict[str, Mapping[str, Any]]:
        """Methods that run files can name, sorted; names offered twice are left out."""
        return self._unique(METHOD)

    def method(self, name: str) -> Mapping[str, Any]:
        """Fields of a diffusion run; PluginError if the name is unknown or offered twice."""
        return self._find(METHOD, name, self.methods())

    def converter(self, name: str) -> Callable[..., Any]:
        """Function from a folder to a `ForeignCheckpoint`; PluginError if the name is unknown or offered twice."""
        readers: dict[str, Callable[..., Any]] = self._unique(CONVERTER)
        return self._find(CONVERTER, name, readers)

    def commands(self) -> dict[str, Any]:
        """Typer apps that plugins add to `l2d`, by name, sorted; names offered twice are left out."""
        return self._unique(COMMAND)

    def task_folders(self) -> list[Path]:
        """Folders of task files that plugins bring, of each plugin its own."""
        return list(self._unique(TASKS).values())

    def table(self) -> list[PluginRow]:
        """Everything found, good or bad: rows by kind, then for the plugins that were kept out."""
        order = [*INTERFACES, METHOD, PRESET, CONVERTER, COMMAND, TASKS]
        keys = sorted(self._offers, key=lambda key: (order.index(key[0]), key[1]))
        rows = [_row(offer, self._offers[key]) for key in keys for offer in self._offers[key]]
        rows += [PluginRow("", s.plugin, s.distribution, s.version, "disabled") for s in self.disabled]
        rows += [PluginRow("", name, b.distribution, b.version, "broken", b.error) for name, b in self.broken.items()]
        return rows

    def _add(self, entry_point: EntryPoint, allowed: set[str] | None, group: str) -> None:
        source = source_of(entry_point)
        if self._is_left_out(source, allowed):
            return
        try:
            with untouched_modules():
                offers = offers_of(entry_point, group)
        except KeyboardInterrupt:
            raise
        # A plugin's code may fail in any way, sys.exit() and errors that are no Exception included.
        except BaseException as error:
            name = source.plugin if source.plugin not in self.broken else f"{source.plugin} of {source.distribution}"
            self.broken[name] = BrokenPlugin(source.distribution, source.version, _told(error))
            return
        self._loaded.add(source.plugin)
        for offer in offers:
            if not _is_builtin(source) and offer.kind in (*INTERFACES, CONVERTER):
                from l2d_framework.blame import attribute

                attribute(offer.value, source.shipped)
            self._offers.setdefault((offer.kind, offer.name), []).append(offer)

    def _is_left_out(self, source: Source, allowed: set[str] | None) -> bool:
        if allowed is None or _is_builtin(source) or source.plugin in allowed:
            return False
        self.disabled.append(source)
        return True

    def _unique(self, kind: str) -> dict[str, Any]:
        offers = sorted(self._offers.items(), key=lambda item: item[0])
        return {name: offered[0].value for (of, name), offered in offers if of == kind and len(offered) == 1}

    def _find(self, kind: str, name: str, known: Mapping[str, T]) -> T:
        if name in known:
            return known[name]
        if offers := self._offers.get((kind, name)):
            raise PluginError(_clash(offers))
        lines = [unknown(kind, name, known)]
        for plugin, broken in self.broken.items():
            lines.append(f"Broken plugin {Source(plugin, broken.distribution, broken.version)}: {broken.error}")
        if self.disabled:
            lines.append(f"Disabled by {ALLOW_LIST}: {', '.join(map(str, self.disabled))}.")
        if len(lines) == 1 and not suggest(name, known):
            also = "; in Python, `generate` takes an object of its class, too" if kind in _AS_OBJECTS else ""
            lines = [f"{lines[0]} Install the plugin that offers it{also}."]
        raise PluginError("\n".join(lines))


_LOADING = RLock()
"""Held while plugins load: what a second thread imports meanwhile would be taken for a plugin's doing."""


def registry() -> Registry:
    """The plugins of this process, loaded at the first call; the same at every call."""
    with _LOADING:
        return _loaded()


def extensions() -> Registry:
    """Plugins of this process with commands and tasks, loaded at the first call; costs no import of torch."""
    with _LOADING:
        return _loaded(EXTENSIONS)


@cache
def _loaded(group: str = GROUP) -> Registry:
    return Registry.load(group=group)


@cache
def declared() -> Registry:
    """Names that the plugins of this process declare, found at the first call without importing any."""
    return Registry.declared()


def _allow_list() -> set[str] | None:
    listed = os.environ.get(ALLOW_LIST)
    return None if listed is None else {name.strip() for name in listed.split(",")} - {""}


def _is_builtin(source: Source) -> bool:
    return source.distribution.replace("_", "-").lower() == BUILTIN_DISTRIBUTION


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # an error that cannot even say what it is
        return type(error).__name__


def _row(offer: Offer, offered: list[Offer]) -> PluginRow:
    source = offer.source
    row = (offer.kind, offer.name, source.distribution, source.version)
    if len(offered) > 1:
        return PluginRow(*row, "clash", _clash(offered))
    if offer.kind in INTERFACES and offer.value.missing_requirements():
        return PluginRow(*row, "missing extra", _missing_extra(offer.value))
    return PluginRow(*row, "ok")


def _clash(offers: list[Offer]) -> str:
    sources = " and ".join(str(offer.source) for offer in offers)
    return (
        f"{offers[0].kind.capitalize()} {offers[0].name!r} is offered by {len(offers)} plugins: {sources}. "
        f"Uninstall all but one, or name the plugins to load in {ALLOW_LIST}."
    )


def _missing_extra(component: type[Component]) -> str:
    missing = component.missing_requirements()
    command = install(component.extra) if component.extra else f"pip install '{' '.join(missing)}'"
    return (
        f"{component.kind.capitalize()} {component.component_name()!r} needs {', '.join(missing)}, which is not "
        f"installed. Run: {command}"
    )
