"""From pydantic's errors to one message a user can act on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from l2d_framework.errors import ConfigError, PluginError, shown, suggest
from l2d_framework.registry import INTERFACES, Registry, registry

M = TypeVar("M", bound=BaseModel)
Path = tuple[str | int, ...]


def validated(model: type[M], data: Mapping[str, Any], where: str = "") -> M:
    """A section made from JSON-ready data."""
    wrong = dict(_component_problems(data, registry, lambda kind, name: registry().get(kind, name)))
    try:
        # JSON mode lets strict fields take what JSON can express, such as a list for a tuple.
        section = model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError(_told(model, data, where, wrong, error.errors())) from None
    if wrong:
        raise ConfigError(_told(model, data, where, wrong, []))
    return section


def refuse_unknown(model: type[BaseModel], data: Mapping[str, Any], where: str, names: Registry) -> None:
    """Refuse fields and values that no plugin and no preset can make right, and names that no plugin declares.

    Args:
        model: the section, with anything in place of its components.
        data: what the user wrote; what is left out may come from a method or preset, and is no mistake here.
        where: its path, for messages.
        names: what plugins declare.

    Raises:
        ConfigError: in the words of `validated`.
    """
    wrong = dict(_component_problems(data, lambda: names, names.check_name, is_whole=False))
    errors: list[Any] = []
    try:
        model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        # Fields may disagree with defaults and agree with the method's values; null may stand for a default.
        left = ("missing", "value_error")
        errors = [one for one in error.errors() if one["type"] not in left and one["input"] is not None]
    if wrong or errors:
        raise ConfigError(_told(model, data, where, wrong, errors))


def _told(
    model: type[BaseModel], data: Mapping[str, Any], where: str, wrong: Mapping[Path, str], errors: Sequence[Any]
) -> str:
    problems = {path: [text] for path, text in wrong.items()}
    for details in errors:
        path = _place(details["loc"], data)
        if not any(path[: len(component)] == component for component in wrong):
            problems.setdefault(path, []).append(_text(details, model, path))
    return "\n".join(_line(where, path, texts) for path, texts in problems.items())


def _line(where: str, path: Path, texts: list[str]) -> str:
    place = ".".join(str(part)[:80] for part in ((where, *path) if where else path))
    return f"{place or 'run'}: {' or '.join(dict.fromkeys(texts))}"


def _component_problems(
    data: Mapping[str, Any],
    plugins: Callable[[], Registry],
    find: Callable[[str, str], object],
    *,
    is_whole: bool = True,
) -> Iterator[tuple[Path, str]]:
    """Components that cannot be had, in the registry's words; they sit under their kind, here or in a section.

    Where not all `is_whole` yet, names may still come from a method or preset.
    """
    for path, section in (((), data), *(((name,), data.get(name)) for name in ("sampling", "noise"))):
        if not isinstance(section, Mapping):
            continue
        for kind in INTERFACES:
            chosen = section.get(kind)
            entries: list[tuple[Path, Any]] = [((*path, kind), chosen)]
            if isinstance(chosen, list):
                entries = [((*path, kind, index), entry) for index, entry in enumerate(chosen)]
            for place, entry in entries if chosen is not None else ():
                name = entry.get("name") if isinstance(entry, Mapping) else None
                if isinstance(name, str):
                    try:
                        find(kind, name)
                    except PluginError as error:
                        yield place, str(error)
                elif is_whole or not isinstance(entry, Mapping) or "name" in entry:
                    known = ", ".join(plugins().components(kind)) or "none"
                    hint = f"write {{name: ...}} with one of: {known}"
                    yield place, f"should be a section with a name, got {shown(entry)}; {hint}"


def _place(loc: Path, data: Any) -> Path:
    """Path in the run file; pydantic's own also names the branches of unions."""
    path: Path = ()
    for step, part in enumerate(loc):
        if isinstance(data, Mapping) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not isinstance(data, Mapping) or step < len(loc) - 1:
            continue
        path += (part,)
    return path


def _text(details: Any, model: type[BaseModel], path: Path) -> str:
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        known = _known_fields(model, details["loc"])
        return f"unknown field, got {shown(value)}{suggest(str(path[-1]), known) or ';'} known: {', '.join(known)}"
    if kind == "missing":
        return "is required; add it"
    if kind == "value_error":
        return str(details["ctx"]["error"])
    what = details["msg"].replace("Input should be", "should be")
    what = what.replace("an object", "a section").replace("array", "list")
    is_misspelt = kind == "literal_error" and isinstance(value, str)
    hint = suggest(value, details["ctx"]["expected"].split("'")) if is_misspelt else ""
    return f"{what}, got {shown(value)}{hint}"


def _known_fields(model: type[BaseModel], loc: Path) -> list[str]:
    models = [model]
    for part in loc[:-1]:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models(field.annotation)]
        elif isinstance(part, str):  # a branch of a union of components
            models = [m for m in models if "name" in m.model_fields and m.model_fields["name"].default == part]
    return [name for m in models for name in m.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
