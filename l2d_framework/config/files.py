"""Reading run files: YAML without its traps, and `key=value` overrides."""

from __future__ import annotations

import copy
import json
import re
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import yaml

from l2d_framework.errors import ConfigError, shown

_DEPTH = 100
"""Sections and lists inside each other; below what a repr, a copy or pydantic can take."""
_VALUES = 100_000
"""Values of one text, each alias counted with all it stands for."""
_YAML_CHARACTERS, _JSON_CHARACTERS = 1_000_000, 64_000_000
_DIGITS = 400
"""Longest number; Python refuses to write out one of more than 4,300 digits."""
_TAG = "tag:yaml.org,2002:"
_STRING = f"{_TAG}str"
_TOO_DEEP = f"sections and lists lie more than {_DEPTH} deep"
_TOO_LONG = f"a number has more than {_DIGITS} digits"
_TOO_MANY = f"it stands for more than {_VALUES:,} values"
_TAGS: dict[str, list[re.Pattern[str]]] = {}
"""By tag of a scalar, what it may look like."""


def _refuse(problem: str, mark: Any) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2 (`1e-5` is a number; `no`, `on` and dates are text), string keys, no duplicate keys.

    Depth and number of values are bounded while the text is read, before aliases are followed.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 -- declared so by PyYAML

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def fetch_flow_collection_start(self, token: Any) -> None:
        # The scanner runs ahead of the composer, at a cost that grows with the square of the open brackets.
        if self.flow_level >= _DEPTH:
            _refuse(_TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > _DEPTH:
            _refuse(_TOO_DEEP, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                _refuse(f"*{event.anchor} stands inside what it names", event.start_mark)
        elif isinstance(node, yaml.ScalarNode):
            self._sizes[id(node)] = 1
        else:
            parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
        if self._sizes[id(node)] > _VALUES:
            _refuse(_TOO_MANY, event.start_mark)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        _check_tag(node, _STRING, *_TAGS)
        if node.tag != _STRING:
            if not any(pattern.match(node.value) for pattern in _TAGS[node.tag]):
                _refuse(f"{shown(node.value)} is no {node.tag.rpartition(':')[2]}", node.start_mark)
            if len(node.value) > _DIGITS:
                _refuse(f"{_TOO_LONG}, got {len(node.value)}", node.start_mark)
        return node

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        node = super().compose_sequence_node(anchor)
        _check_tag(node, f"{_TAG}seq")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        _check_tag(node, f"{_TAG}map")
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("a key must be a single word", key.start_mark)
            if key.tag == f"{_TAG}merge":
                continue
            if key.value in seen:
                _refuse(f"duplicate key {shown(key.value)}", key.start_mark)
            seen.add(key.value)
            key.tag = _STRING
        return node


def _check_tag(node: yaml.Node, *known: str) -> None:
    if node.tag not in known:
        _refuse(f"the tag {shown(node.tag.replace(_TAG, '!!'))} is not understood here", node.start_mark)


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _whole = re.compile(rf"({_pattern})\Z")
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", _whole, _first)
    _TAGS.setdefault(f"{_TAG}{_kind}", []).append(_whole)
# PyYAML reads a leading zero as octal.
_Loader.add_constructor(f"{_TAG}int", lambda _, node: int(node.value))


def parse_yaml(text: str, source: str) -> Any:
    """Value of a YAML text; refused where a key stands twice, or the text is too long, too deep or recursive."""
    _check_length(text, source, _YAML_CHARACTERS)
    try:
        return _checked(yaml.load(text, Loader=_Loader), source)  # a SafeLoader underneath
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{line}: {error.problem}. Correct the YAML.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}. Correct the YAML.") from error


def parse_json(text: str, source: str) -> Any:
    """Value of a JSON text that a user, or a stranger, wrote."""
    _check_length(text, source, _JSON_CHARACTERS)
    try:
        return _checked(json.loads(text), source)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}, line {error.lineno}: {error.msg}. Correct the JSON.") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: {_TOO_DEEP}. Correct the JSON.") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {_TOO_LONG}. Correct the JSON.") from error


def read_text(path: str | Path) -> str:
    """Text of a file, but no more than can be parsed."""
    with open(path, encoding="utf-8-sig") as file:
        return file.read(_JSON_CHARACTERS + 1)


def _check_length(text: str, source: str, most: int) -> None:
    if len(text) > most:
        raise ConfigError(f"{source}: holds more than {most:,} characters. Is it the right file?")


def _checked(value: Any, source: str) -> Any:
    # No recursion, as depth is what is checked: what passes can be copied, compared, written and shown.
    stack = [(value, 1)]
    while stack:
        one, depth = stack.pop()
        if depth > _DEPTH:
            raise ConfigError(f"{source}: {_TOO_DEEP}. Write it flatter.")
        if isinstance(one, dict | list):
            parts = [*one, *one.values()] if isinstance(one, dict) else one
            stack += [(part, depth + 1) for part in parts]
        elif isinstance(one, str) and not one.isascii() and any("\ud800" <= letter <= "\udfff" for letter in one):
            raise ConfigError(f"{source}: {shown(one)} holds half a character (a lone surrogate). Remove it.")
        elif isinstance(one, int) and abs(one) >= 10**_DIGITS:
            raise ConfigError(f"{source}: {_TOO_LONG}. Write a smaller one.")
    return value


def read_file(path: str | Path) -> dict[str, Any]:
    """Contents of a run file."""
    path = Path(path)
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise ConfigError(f"Run file {str(path)!r} does not exist. Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Run file {str(path)!r} cannot be read: {error}. Give a YAML or JSON text file.") from error
    data = (parse_json if path.suffix == ".json" else parse_yaml)(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: a run file holds `key: value` lines, got {shown(data)}. Start from an example run file."
        )
    return data


def override(data: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Run data with values replaced by assignments such as `data.train.0.path=my.jsonl`; missing sections are made."""
    data = copy.deepcopy(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        named = f"Override {shown(assignment)}"
        if not equals or not all(path.split(".")) or path.count(".") > _DEPTH:
            raise ConfigError(f"{named} is no key=value. Write it like training.max_steps=100.")
        *parents, last = path.split(".")
        section: Any = data
        for key in parents:
            place = _place(section, key, named)
            if isinstance(section, dict) and section.get(place) is None:
                section[place] = {}
            section = section[place]
        section[_place(section, last, named)] = parse_yaml(text, named)
    return data


def _place(section: Any, key: str, named: str) -> Any:
    if isinstance(section, dict):
        return key
    if not isinstance(section, list):
        raise ConfigError(f"{named}: {shown(key)} lies below the value {shown(section)}. Give a whole section.")
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(section):
        raise ConfigError(f"{named}: the list has {len(section)} entries, got {shown(key)}. Count from 0.")
    return int(key)
