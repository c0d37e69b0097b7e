"""Files that mean harm, or are no run file at all: refused in one message, before anything is built from them."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from l2d_bench import folder as bench_folder
from l2d_bench.files import read_profile
from l2d_framework.config import load_run, parse_stages
from l2d_framework.config.files import override, parse_json, parse_yaml, read_file
from l2d_framework.errors import ConfigError, L2DError
from l2d_framework.evaluation.search.search import check_search
from l2d_framework.training.output_dir import read_card


def levels(first: str, entry: str) -> str:
    """Nine levels, each of which names the one below nine times."""
    later = [f"a{n}: &a{n} {entry.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 10)]
    return "\n".join([f"a0: &a0 {first}", *later])


def refusal(act: Callable[[], object]) -> str:
    """What this package says against it, if anything; whatever else is raised fails the test."""
    try:
        act()
    except L2DError as error:
        return str(error)
    return ""


BOMBS = {
    "aliases": (levels("[x]", "[{}]"), "more than 100,000 values"),
    "aliases under a known key": (levels("[x]", "[{}]") + "\nkind: *a9", "more than 100,000 values"),
    "merges": (levels("{x: 1}", "{{<<: [{}]}}"), "more than 100,000 values"),
    "itself in a section": ("&m {base: *m}", r"\*m stands inside what it names"),
    "itself in a list": ("a: &m [*m]", r"\*m stands inside what it names"),
    "brackets": ("[" * 3000, "100 deep"),
    "braces": ("{a: " * 3000, "100 deep"),
    "closed brackets": ("[" * 3000 + "]" * 3000, "100 deep"),
    "dashes": ("- " * 3000, "100 deep"),
    "indents": ("\n".join(" " * n + "a:" for n in range(300)), "100 deep"),
    "digits": ("seed: " + "1" * 10_000, "more than 400 digits, got 10000"),
    "exponent": ("seed: 1e" + "1" * 10_000, "more than 400 digits"),
    "no integer": ("seed: !!int abc", "'abc' is no int"),
    "no boolean": ("seed: !!bool yes", "'yes' is no bool"),
    "bytes": ("seed: !!binary YQ==", "'!!binary' is not understood"),
    "a set": ("seed: !!set {a}", "'!!set' is not understood"),
    "pairs": ("seed: !!omap [a: 1]", "'!!omap' is not understood"),
    "a call": ("seed: !!python/object/apply:os.getcwd []", "is not understood"),
    "half a character": ('seed: "\\ud800"', "half a character"),
    "length": ("seed: " + "x" * 2_000_000, "more than 1,000,000 characters"),
}
JSON_BOMBS = {
    "brackets": ("[" * 100_000, "100 deep"),
    "closed brackets": ('{"a":' * 500 + "1" + "}" * 500, "100 deep"),
    "digits": ('{"seed": ' + "1" * 10_000 + "}", "more than 400 digits"),
    "fewer digits": ('{"seed": ' + "1" * 4000 + "}", "more than 400 digits"),
    "half a character": ('{"a": "\\ud800"}', "half a character"),
    "half a key": ('{"\\udfff": 1}', "half a character"),
    "no JSON": ("{", "line 1"),
}


@pytest.mark.parametrize(("text", "message"), BOMBS.values(), ids=BOMBS)
def test_a_hostile_text_is_refused_at_once_in_a_short_message(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    began = time.process_time()
    for read in (lambda: load_run(file), lambda: read_profile(str(file)), lambda: override({}, [f"seed={text}"])):
        with pytest.raises(ConfigError, match=message) as caught:
            read()
        assert len(str(caught.value)) < 400
    assert time.process_time() - began < 2


@pytest.mark.parametrize(("text", "message"), JSON_BOMBS.values(), ids=JSON_BOMBS)
def test_a_hostile_json_file_is_refused_wherever_one_is_read(text, message, tmp_path):
    file = tmp_path / "run.json"
    file.write_text(text)
    for read in (
        lambda: load_run(file),
        lambda: parse_json(text, "x"),
        lambda: check_search({"search": str(file)}),
        lambda: read_card(tmp_path),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            read()
        assert len(str(caught.value)) < 400


def test_what_is_within_the_bounds_is_read():
    deep: Any = 1
    for _ in range(98):
        deep = [deep]
    shared = "a: &a {b: [1, 2]}\nc: [*a, *a]\nd: {<<: *a, e: !!float 1e3, f: !!str 1, g: !!int 7}"
    for value in (deep, {"a": 10**399, "b": "\U0001f600", "c": [1] * 2_000, "d": -0.5}):
        assert parse_json(json.dumps(value), "x") == value
        assert parse_yaml(json.dumps(value, ensure_ascii=False), "x") == value
    values = {"a": {"b": [1, 2]}, "c": [{"b": [1, 2]}] * 2, "d": {"b": [1, 2], "e": 1e3, "f": "1", "g": 7}}
    assert parse_yaml(shared, "x") == values


@pytest.mark.parametrize("data", ["{}", "stages: {}", "kind: {}", "kind: [{}]", "seed: {}", "{}: 1", "{}: {{{}: 1}}"])
def test_a_long_value_is_shown_by_its_beginning(data, tmp_path):
    (tmp_path / "run.yaml").write_text(data.replace("{}", "x" * 999))
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml")
    assert "x" * 300 not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    for file in (tmp_path / "run.yaml", tmp_path / "run.json"):
        file.write_text('{"seed": 1}', encoding="utf-8-sig")
        assert read_file(file) == {"seed": 1}


@pytest.mark.parametrize("path", ["list." + "9" * 5000, ".".join("a" * 5000), "list.0." + "b" * 5000, "a" * 5000])
def test_an_override_with_a_hostile_path_is_refused_or_harmless(path):
    assert len(refusal(lambda: repr(override({"list": [1]}, [f"{path}=1"])))) < 400


ODD = [3, -1, 1.5, float("nan"), "a", "", True, None, [], {}, [1], ["a"], [[]], [{}], {"a": 1}, {"name": [1]}, 10**300]
MORE = [
    *((name,) for name in ("classes", "sampling", "seed", "block_size", "kind", "preset", "noise", "stages")),
    *(("sampling", name) for name in ("preset", "solver", "guidance", "estimate")),
    ("parametrization", "estimate"),
    ("data", "padding"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


def replaced(data: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(data)
    section: Any = data
    for key in path[:-1]:
        section = section.setdefault(key, {}) if isinstance(section, dict) else section[key]
    section[path[-1]] = value
    return data


@pytest.mark.parametrize("name", ["tiny_l2d", "tiny_tess", "tess_reward_script", "tess_ar_mistral_gsm8k"])
def test_a_value_of_any_type_at_any_place_is_taken_or_refused_by_name(name):
    data = read_file(Path(bench_folder(), "runs", f"{name}.yaml"))
    stages = data.get("stages", [data])
    for stage in (stages[0], stages[-1]):
        for path in {*places(stage), *MORE}:
            for value in ODD:
                refusal(partial(parse_stages, replaced(stage, path, value)))


def test_a_search_file_of_any_shape_is_taken_or_refused_by_name(tmp_path):
    file = tmp_path / "search.json"
    for value in (*ODD, *({"categories": value} for value in ODD), *({"categories": {"a": value}} for value in ODD)):
        file.write_text(json.dumps(value))
        refusal(lambda: check_search({"search": str(file)}))
