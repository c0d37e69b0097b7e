"""`l2d help`: what an option of a run file means, in the words of the JSON schema."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2d_framework.cli.completion import help_names
from l2d_framework.errors import ConfigError, suggest

if TYPE_CHECKING:
    from rich.console import Console

Schema = Mapping[str, Any]
Screen = tuple[str, tuple[tuple[str, str], ...]]
"""What a field or component is, and rows of facts and of what is inside."""

_TYPES = {"integer": "whole number", "boolean": "true or false", "string": "text", "object": "section", "null": "none"}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "multipleOf": "a multiple of {}",
    "minItems": "at least {} of them",
}


@dataclass(frozen=True)
class Place:
    """A field of a run file, or a component that may stand in one."""

    path: tuple[str, ...]
    """Names of fields, each perhaps followed by a component's."""
    depth: int
    """Number of fields among them."""
    run: str
    schema: Schema

    def answers(self, words: tuple[str, ...]) -> bool:
        """Whether it has the last of these names and lies below the others."""
        names = iter(self.path)
        return self.path[-1] == words[-1] and all(word in names for word in words)


def help_(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME", help="Such as training.draws_per_token, or solver midpoint.", autocompletion=help_names
        ),
    ] = None,
) -> None:
    """Explain an option of run files, or a drafter: what it does, its type, default, allowed values and source."""
    from rich.console import Console

    from l2d_framework.config import json_schema

    schema = json_schema()
    places = [place for part in schema["$defs"].values() for place in places_of_run(schema, part)]
    places += _drafters(schema)
    words = tuple(word for name in names or [] for word in name.split(".") if word and not word.isdecimal())
    found = [place for place in places if not words or place.answers(words)]
    if not found:
        raise ConfigError(_unknown(places, words))
    nearest = min(place.depth for place in found)
    screens: dict[Screen, list[Place]] = {}
    for place in found:
        if place.depth == nearest and (words or place.path[1:] == ()):
            screens.setdefault(_screen(schema, place, is_whole=bool(words)), []).append(place)
    is_asked = Console().is_terminal or "COLUMNS" in os.environ
    console = Console(width=None if is_asked else 120)
    with console.capture() as written:
        _print(console, screens)
    further = sorted({".".join(place.path) for place in found if place.depth > nearest})
    # Tables are filled up with blanks, which would go into a pipe.
    for line in written.get().splitlines():
        typer.echo(line.rstrip())
    if words and further:
        console.print(f"See also: {', '.join(further)}", markup=False, highlight=False)


def _unknown(places: Sequence[Place], words: tuple[str, ...]) -> str:
    """What is wrong with names that no place has, and which may stand where the wrong one does."""
    count = next((n for n in range(len(words) - 1, 0, -1) if any(place.answers(words[:n]) for place in places)), 0)
    above, wrong = words[:count], words[count]
    tops = {place.path for place in places if place.answers(above)} if above else {()}
    there = {place.path[len(top)] for top in tops for place in places if _is_right_below(place.path, top)}
    hint = suggest(wrong, there) or suggest(wrong, {name for place in places for name in place.path}) or "."
    listed = f"{' '.join(above).capitalize() or 'Sections'}: {', '.join(sorted(there))}." if there else ""
    return f"No option of run files is called {' '.join(words)!r}{hint} {listed} `l2d help` lists all sections."


def _is_right_below(path: tuple[str, ...], top: tuple[str, ...]) -> bool:
    return len(path) == len(top) + 1 and path[: len(top)] == top


def _print(console: Console, screens: Mapping[Screen, Sequence[Place]]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    for (text, rows), shown in screens.items():
        runs = ", ".join(dict.fromkeys(place.run for place in shown))
        console.print(f"{'.'.join(shown[0].path)}  (kind: {runs})", style="bold", markup=False, highlight=False)
        console.print(Padding(Text(text), (0, 0, 0, 2)))
        table = Table.grid(padding=(0, 2))
        for row in rows:
            table.add_row("", *map(Text, row))
        if rows:
            console.print(table)


def places_of_run(schema: Schema, part: Schema) -> Iterator[Place]:
    """Every field of a kind of run, which `part` of the schema describes."""
    kind = part.get("properties", {}).get("kind", {}).get("const")
    if kind is not None:
        yield from _fields(schema, part, Place((), 0, kind, part))


def _drafters(schema: dict[str, Any]) -> Iterator[Place]:
    """Drafters, which no run file names but a request; what their fields are is put into the schema."""
    from pydantic import TypeAdapter

    from l2d_framework.config.reference import DescribedSchema
    from l2d_framework.config.sampling import component_type
    from l2d_framework.registry import registry

    field = TypeAdapter(component_type(registry(), "drafter")).json_schema(schema_generator=DescribedSchema)
    schema["$defs"] |= field.pop("$defs", {})
    field["description"] = "Who guesses the tokens to come, so that diffusion can solve several at once."
    yield from _fields(schema, {"properties": {"drafter": field}}, Place((), 0, "request", field))


def _fields(schema: Schema, section: Schema, above: Place) -> Iterator[Place]:
    for name, field in section["properties"].items():
        if "const" in field:
            continue
        here = Place((*above.path, name), above.depth + 1, above.run, field)
        yield here
        for inner in _sections(schema, field):
            tag = _tag(inner)
            if tag is not None:
                component = Place((*here.path, tag), here.depth, here.run, inner)
                yield component
            yield from _fields(schema, inner, here if tag is None else component)


def _sections(schema: Schema, field: Schema) -> list[Schema]:
    """What may stand in a field and has fields of its own."""
    if "$ref" in field:
        field = schema["$defs"][field["$ref"].rpartition("/")[2]]
    if "properties" in field:
        return [field]
    return [section for part in _parts(field) for section in _sections(schema, part)]


def _parts(field: Schema) -> list[Schema]:
    items = field.get("items")
    return [*field.get("anyOf", []), *field.get("oneOf", []), *([items] if isinstance(items, dict) else [])]


def _tag(section: Schema) -> str | None:
    """Name of a component; None of a plain section."""
    name: str | None = section["properties"].get("name", {}).get("const")
    return name


def _screen(schema: Schema, place: Place, *, is_whole: bool) -> Screen:
    text = str(place.schema.get("description", ""))
    if not is_whole:
        return _first(text), ()
    if "properties" in place.schema:
        return text, (("from", _distribution(place.path[-1])), *_inside([place.schema]))
    sections = _sections(schema, place.schema)
    # Where the defaults of a section are from is no source of each of its fields.
    if len(sections) == 1 and _tag(sections[0]) is None and (more := str(sections[0].get("description", ""))):
        text = more if _first(text) in _first(more) else f"{text}\n\n{more}"
    described = (part for part in _parts(place.schema) if "const" in part and part.get("description"))
    values = ((str(part["const"]), _first(part["description"])) for part in described)
    return text, (*facts(schema, place), *values, *_inside(sections))


def facts(schema: Schema, place: Place) -> Iterator[tuple[str, str]]:
    """Names and texts of what is to be known of a field beside its meaning, such as its type and default."""
    field = place.schema
    yield "type", _type(schema, field)
    if not _sections(schema, field):
        yield "default", json.dumps(field["default"]) if "default" in field else "none, it must be given"
    if allowed := list(_allowed(field)):
        yield "allowed", "; ".join(allowed)


def _inside(sections: Sequence[Schema]) -> Iterator[tuple[str, str]]:
    """The components that may stand in a field, or the fields of its section, each with a sentence."""
    for section in sections:
        if len(sections) > 1 and (tag := _tag(section)):
            yield tag, _first(str(section.get("description", "")))
            continue
        for name, field in section["properties"].items():
            if "const" not in field:
                yield name, _first(str(field.get("description", "")))


def _first(text: str) -> str:
    """The first sentence of a text."""
    return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].removesuffix(".")


def _type(schema: Schema, field: Schema) -> str:
    if "$ref" in field or "properties" in field:
        return "section"
    if "const" in field:
        return json.dumps(field["const"])
    if field.get("type") == "array":
        return f"list of: {_type(schema, field['items'])}" if isinstance(field.get("items"), dict) else "list"
    if parts := [*field.get("anyOf", []), *field.get("oneOf", [])]:
        return " or ".join(dict.fromkeys(_type(schema, part) for part in parts))
    name = str(field.get("type", "string" if "enum" in field else "any"))
    return _TYPES.get(name, name)


def _allowed(field: Schema) -> Iterator[str]:
    if "enum" in field:
        yield ", ".join(map(str, field["enum"]))
    yield from (text.format(field[name]) for name, text in _BOUNDS.items() if name in field)
    for part in _parts(field):
        yield from _allowed(part)


def _distribution(name: str) -> str:
    from l2d_framework.registry import registry

    rows = [row for row in registry().table() if row.name == name]
    return ", ".join(f"{row.distribution} {row.version}" for row in rows) or "l2d-framework"
