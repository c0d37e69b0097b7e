"""What a shell offers behind the options of `l2d`: names that plugins declare and keys of run files, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, get_args

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel


def values(*allowed: str) -> Callable[[str], list[str]]:
    """Completion of one of these."""
    return lambda incomplete: _beginning(incomplete, allowed)


def names(kind: str, *others: str) -> Callable[[str], list[str]]:
    """Completion of the name of a component, preset or the like, or of another word."""

    def offer(incomplete: str) -> list[str]:
        from l2d_framework.registry import declared

        return _beginning(incomplete, (*declared().names(kind), *others))

    return offer


def run_keys(incomplete: str) -> list[str]:
    """Completion of a replaced value of a run file, of any kind of run."""
    return _beginning(incomplete, (f"{key}=" for key in _all_keys()))


def sampling_keys(incomplete: str) -> list[str]:
    """Completion of a setting of `--set`."""
    from l2d_framework.config.sampling import sampling_type

    return _beginning(incomplete, (f"{key}=" for key in _keys(sampling_type(None))))


def help_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completion of what `l2d help` explains: a section, a field in it and, behind a kind of component, its name.

    Fields of components are left out, since they are known only once plugins and torch are imported.
    """
    from l2d_framework.registry import INTERFACES, declared

    *front, last = incomplete.split(".")
    above = [word for name in ctx.params.get("names") or () for word in name.split(".")] + front
    paths = [[word for word in key.split(".") if not word.isdecimal()] for key in _all_keys()]
    known = set(declared().names(above[-1])) if above and above[-1] in INTERFACES else set()
    # From the top, unless something stands before that lies below: `l2d help masking objectives`.
    for path in paths:
        for start in range(len(path) - len(above)) if above else (0,):
            if path[start : start + len(above)] == above:
                known.add(path[start + len(above)])
    return [".".join((*front, name)) for name in _beginning(last, known)]


def _all_keys() -> Iterator[str]:
    from l2d_framework.config.reward import reward_type
    from l2d_framework.config.runs import LanguageModelRun, diffusion_type

    for kind in (diffusion_type(None), LanguageModelRun, reward_type(None)):
        yield from _keys(kind)


def _beginning(incomplete: str, known: Iterable[str]) -> list[str]:
    return sorted({name for name in known if name.startswith(incomplete)})


def _keys(section: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner, entry = _section_of(field.annotation)
        if inner is None:
            yield above + name
        else:
            yield from _keys(inner, f"{above}{name}.{entry}")


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The section that a field holds, and "0." if it holds a list of them, which overrides count from 0."""
    from l2d_framework.config.sections import Section

    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, ""
    for argument in get_args(annotation):
        inner, entry = _section_of(argument)
        if inner is not None:
            return inner, "0." if getattr(annotation, "__origin__", None) is list else entry
    return None, ""
