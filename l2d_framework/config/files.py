"""Reading run files: YAML without its traps, and `key=value` overrides."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import yaml

from l2d_framework.errors import ConfigError

_STRING = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2 (`1e-5` is a number; `no`, `on` and dates are text), string keys, no duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 -- declared so by PyYAML

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a single word", problem_mark=key.start_mark)
            if key.tag == _MERGE:
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            seen.add(key.value)
            key.tag = _STRING
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"({_pattern})\Z"), _first)
# PyYAML reads a leading zero as octal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def parse_yaml(text: str, source: str) -> Any:
    """Value of a YAML text.

    Args:
        text: one YAML document.
        source: where it comes from, for messages.

    Returns:
        Dictionaries with string keys, lists, strings, numbers, booleans and None.

    Raises:
        ConfigError: if it is not well-formed or holds a key twice; names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader underneath
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{line}: {error.problem}. Correct the YAML.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}. Correct the YAML.") from error


def read_file(path: str | Path) -> dict[str, Any]:
    """Contents of a run file.

    Args:
        path: a YAML or JSON file.

    Returns:
        Its top level.

    Raises:
        ConfigError: if it cannot be read or its top level is no section.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"Run file {str(path)!r} does not exist. Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Run file {str(path)!r} cannot be read: {error}. Give a YAML or JSON text file.") from error
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {error.lineno}: {error.msg}. Correct the JSON.") from error
    else:
        data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a run file holds `key: value` lines, got {data!r}. Start from an example run file.")
    return data


def override(data: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Run data with some values replaced.

    Args:
        data: contents of a run file.
        assignments: such as `training.max_steps=100` or `data.train.0.path=my.jsonl`; values are YAML.

    Returns:
        A changed copy; sections that do not exist are made.

    Raises:
        ConfigError: if an assignment is malformed or its path leads nowhere.
    """
    data = copy.deepcopy(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not all(path.split(".")):
            raise ConfigError(f"Override {assignment!r} is no key=value. Write it like training.max_steps=100.")
        *parents, last = path.split(".")
        section: Any = data
        for key in parents:
            place = _place(section, key, assignment)
            if isinstance(section, dict) and section.get(place) is None:
                section[place] = {}
            section = section[place]
        section[_place(section, last, assignment)] = parse_yaml(text, f"Override {assignment!r}")
    return data


def _place(section: Any, key: str, assignment: str) -> Any:
    if isinstance(section, dict):
        return key
    if not isinstance(section, list):
        raise ConfigError(f"Override {assignment!r}: {key!r} lies below the value {section!r}. Give a whole section.")
    if not key.isdecimal() or int(key) >= len(section):
        raise ConfigError(f"Override {assignment!r}: the list has {len(section)} entries, got {key!r}. Count from 0.")
    return int(key)
