"""Numbers for requests that say the same, so that each has noise of its own and nothing depends on batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from l2d_framework.diffusion.rng import request_keys


def content(arguments: Any) -> str:
    """Hash of what a request asks."""
    return hashlib.sha256(json.dumps(arguments, default=str).encode()).hexdigest()


def occurrences(requests: Sequence[Any], gather: Callable[[Any], list[Any]]) -> list[int]:
    """How often the same question was asked before, in a task's own order of its documents.

    Each process has the documents of its rank, with all repeats of each. The harness pads the shorter lists with
    requests once more; those get the numbers they had before.
    """
    names = [content(request.args) for request in requests]
    places = [_place(request) for request in requests]
    asked: dict[tuple[str, Any], int] = {}
    within = []
    for request, name, place in zip(requests, names, places, strict=True):
        count = asked.get((name, place), 0)
        asked[name, place] = count + 1
        within.append(count % request.repeats if request.repeats else count)
    repeats = {
        (name, place): request.repeats or asked[name, place]
        for request, name, place in zip(requests, names, places, strict=True)
    }
    everywhere: dict[str, dict[Any, int]] = {}
    for part in gather(repeats):
        for (name, place), count in part.items():
            everywhere.setdefault(name, {})[place] = count
    first = {}
    for name, by_place in everywhere.items():
        total = 0
        for place in sorted(by_place):
            first[name, place] = total
            total += by_place[place]
    return [first[name, place] + count for name, place, count in zip(names, places, within, strict=True)]


def noise_key(tokens: Sequence[int], occurrence: int) -> str:
    """Name of a request for its noise."""
    return f"{request_keys([tokens])[0].rpartition('.')[0]}.{occurrence}"


def _place(request: Any) -> tuple[str, int, int]:
    return str(request.task_name), int(request.doc_id or 0), int(request.idx or 0)
