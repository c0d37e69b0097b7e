"""`model:KEY` and `data:KEY/file`: what one entry of a profile says of another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_PATTERN = re.compile(r"(model|data):([^/]+)(/.*)?")


class Reference(NamedTuple):
    """The entry that is meant: `kind` is "model" or "data"."""

    kind: str
    key: str


def references(value: Any) -> Iterator[Reference]:
    """All references in a value.

    Args:
        value: JSON-ready.

    Yields:
        Each, as often as it occurs.
    """
    if isinstance(value, dict):
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)
    elif isinstance(value, str) and (found := _PATTERN.fullmatch(value)):
        yield Reference(found[1], found[2])


def replaced(value: Any, place: Callable[[Reference], str]) -> Any:
    """A value with other texts for its references.

    Args:
        value: JSON-ready.
        place: what stands for the entry; a path below it is kept.

    Returns:
        A changed copy.
    """
    if isinstance(value, dict):
        return {name: replaced(part, place) for name, part in value.items()}
    if isinstance(value, list):
        return [replaced(part, place) for part in value]
    if isinstance(value, str) and (found := _PATTERN.fullmatch(value)):
        return place(Reference(found[1], found[2])) + (found[3] or "")
    return value
