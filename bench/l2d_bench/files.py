"""Where tables, profiles, run files and the papers' numbers lie, and how they are read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from l2d_bench import folder as bench_folder
from l2d_bench.schema import ProfileFile, TableFile
from l2d_framework.config.files import read_file
from l2d_framework.config.validation import validated
from l2d_framework.errors import ConfigError, suggest

F = TypeVar("F", TableFile, ProfileFile)


def commit() -> str | None:
    """Commit of the checkout that this package runs from, wherever the working directory is.

    Returns:
        Its hash, with a remark where files were changed; None for an installed wheel.
    """
    if bench_folder().name == "_files":
        return None
    git = ["git", "-C", str(bench_folder())]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        is_changed = bool(subprocess.run(status, check=True, capture_output=True, text=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} with local changes" if is_changed else head


def table_ids() -> list[str]:
    """The declared tables.

    Returns:
        Their ids, in the papers' order.
    """
    return sorted((path.stem for path in (bench_folder() / "tables").glob("*.yaml")), key=_in_order)


def own_table_ids() -> list[str]:
    """Tables that no paper has; `all` leaves them out, since each needs a profile of its own.

    Returns:
        Their ids.
    """
    return sorted(f"own/{path.stem}" for path in (bench_folder() / "tables" / "own").glob("*.yaml"))


def profile_names() -> list[str]:
    """The declared profiles.

    Returns:
        Their names.
    """
    folder = bench_folder() / "profiles"
    return sorted({path.stem for path in folder.iterdir() if path.suffix == ".yaml" or path.is_dir()})


def read_table(table: str) -> TableFile:
    """A table.

    Args:
        table: its id, or a YAML file.

    Returns:
        What it declares.

    Raises:
        ConfigError: if there is none, or it is wrong.
    """
    path = Path(table) if table.endswith(".yaml") else bench_folder() / "tables" / f"{table}.yaml"
    if not path.is_file():
        hint = suggest(table, [*table_ids(), *own_table_ids()]) or "."
        raise ConfigError(f"Unknown table {table!r}{hint} See `l2d bench --list`.")
    return _parsed(TableFile, read_file(path), path)


def read_profile(profile: str) -> ProfileFile:
    """A profile.

    Args:
        profile: its name, or else a YAML file or a folder of YAML files that make one profile together. With `like`,
            the name of another profile, they say only what is different from that one.

    Returns:
        What it declares.

    Raises:
        ConfigError: if there is none, it is wrong, or two of its files say the same.
    """
    # A name first: an output folder may well be called like the profile.
    path = bench_folder() / "profiles" / profile if profile in profile_names() else Path(profile)
    single = path if path.suffix == ".yaml" else path.with_name(path.name + ".yaml")
    files = [*([single] if single.is_file() else []), *(sorted(path.glob("*.yaml")) if path.is_dir() else [])]
    if not files:
        hint = suggest(profile, profile_names()) or f", known are {profile_names()}."
        raise ConfigError(f"Unknown profile {profile!r}{hint} Give one of them, or a YAML file.")
    return _parsed(ProfileFile, _profile_fields(files, ()), path)


def _profile_fields(files: Sequence[Path], above: Sequence[str]) -> dict[str, Any]:
    """Fields of a profile that others, one like the other, are like."""
    data: dict[str, Any] = {}
    for file in files:
        _add(data, read_file(file), file)
    like = data.pop("like", None)
    if like is None:
        return data
    single = bench_folder() / "profiles" / f"{like}.yaml"
    if not single.is_file():
        known = sorted(path.stem for path in single.parent.glob("*.yaml"))
        hint = suggest(str(like), known) or f", known are {known}."
        raise ConfigError(f"{files[0]}: `like` is no declared profile of one file, got {like!r}{hint} Correct it.")
    if like in above:
        raise ConfigError(f"{files[0]}: `like` leads in a circle, to {like!r} again. Name one that is like none.")
    return _laid_over(_profile_fields([single], (*above, like)), data)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        known = merged.get(name)
        merged[name] = _laid_over(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return merged


def _add(data: dict[str, Any], more: Mapping[str, Any], file: Path) -> None:
    for name, value in more.items():
        if name not in data:
            data[name] = dict(value) if isinstance(value, Mapping) else value
            continue
        known = data[name]
        both = known.keys() & value.keys() if isinstance(known, dict) and isinstance(value, Mapping) else {name}
        if both:
            raise ConfigError(f"{file}: {sorted(both)} of {name!r} stand in another file of this profile; remove one.")
        known |= value


def _parsed(kind: type[F], data: Mapping[str, Any], path: Path) -> F:
    try:
        return validated(kind, data)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be used:\n{error}") from error


@cache
def paper_numbers() -> dict[str, Any]:
    """The numbers the papers print.

    Returns:
        By key: `columns` and `rows`, each with `row` and `values`.
    """
    path = bench_folder() / "tables" / "paper.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def paper_value(table: TableFile, row: str, column: str) -> float | str | None:
    """What the paper prints in one cell.

    Args:
        table: the table.
        row: label of the row.
        column: name of the column.

    Returns:
        A number, a text such as "73M", or None where it prints nothing.
    """
    column = table.paper_columns.get(column, column)
    if table.transposed:
        row, column = column, row
    for key in table.paper:
        numbers = paper_numbers()[key]
        if column in numbers["columns"]:
            place = numbers["columns"].index(column)
            return next((entry["values"][place] for entry in numbers["rows"] if entry["row"] == row), None)
    return None


def _in_order(table: str) -> tuple[Any, ...]:
    digits = "".join(letter if letter.isdigit() else " " for letter in table.split("_", 1)[-1]).split()
    kind = table.rstrip("0123456789abc")
    return (kind, int(digits[0]) if digits else 0, table)


@cache
def code_of(*modules: str) -> str:
    """Fingerprint of source code.

    Args:
        *modules: names of modules, or of packages, which count with all their files.

    Returns:
        A hash.
    """
    found = hashlib.sha256()
    for name in sorted(set(modules)):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None  # modules of this package, with files
        path = Path(spec.origin)
        for file in sorted(path.parent.rglob("*.py")) if spec.submodule_search_locations else [path]:
            found.update(file.read_bytes())
    return found.hexdigest()[:12]
