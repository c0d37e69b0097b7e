"""Numbers for requests that say the same, so that each has noise of its own and nothing depends on batches."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from l2d_framework.diffusion.rng import request_keys


def content(arguments: Any) -> str:
    """Hash of what a request asks."""
    return hashlib.sha256(json.dumps(arguments, default=str).encode()).hexdigest()


def occurrences(requests: Sequence[Any], gather: Callable[[Any], list[Any]]) -> list[int]:
    """How often the same question was asked before, whatever the order of requests and the number of processes.

    Each process has the documents of its rank, with all repeats of each. The harness pads the shorter lists with
    requests once more; those get the numbers they had before. `gather` collects an object of every process.
    """
    keys = [(content(request.args), _place(request)) for request in requests]
    asked: Counter[Any] = Counter()
    within = []
    for request, key in zip(requests, keys, strict=True):
        within.append(asked[key] % request.repeats if request.repeats else asked[key])
        asked[key] += 1
    repeats = {key: request.repeats or asked[key] for request, key in zip(requests, keys, strict=True)}
    everywhere = {key: count for part in gather(repeats) for key, count in part.items()}
    first, total = {}, Counter[str]()
    for name, place in sorted(everywhere):
        first[name, place] = total[name]
        total[name] += everywhere[name, place]
    return [first[key] + count for key, count in zip(keys, within, strict=True)]


def noise_key(tokens: Sequence[int], occurrence: int) -> str:
    """Name of a request for its noise."""
    return f"{request_keys([tokens])[0].rpartition('.')[0]}.{occurrence}"


def _place(request: Any) -> tuple[str, int, int]:
    return str(request.task_name), int(request.doc_id or 0), int(request.idx or 0)
