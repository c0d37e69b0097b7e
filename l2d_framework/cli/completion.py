"""What a shell offers behind the options of `l2d`: names that plugins declare and keys of run files, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel


def names(kind: str) -> Callable[[str], list[str]]:
    """Completion of the name of a component, preset or the like."""

    def offer(incomplete: str) -> list[str]:
        from l2d_framework.registry import declared

        return [name for name in declared().names(kind) if name.startswith(incomplete)]

    return offer


def run_keys(incomplete: str) -> list[str]:
    """Completion of a replaced value of a run file, of any kind of run."""
    from l2d_framework.config.reward import reward_type
    from l2d_framework.config.runs import LanguageModelRun, diffusion_type

    kinds = (diffusion_type(None), LanguageModelRun, reward_type(None))
    return _beginning(incomplete, (key for kind in kinds for key in _keys(kind)))


def sampling_keys(incomplete: str) -> list[str]:
    """Completion of a setting of `--set`."""
    from l2d_framework.config.sampling import sampling_type

    return _beginning(incomplete, _keys(sampling_type(None)))


def _beginning(incomplete: str, keys: Iterator[str]) -> list[str]:
    return sorted({f"{key}=" for key in keys if key.startswith(incomplete)})


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
