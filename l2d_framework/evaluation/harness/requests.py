"""Requests: names by which each has noise of its own, and `--use_cache` made safe by names of models and settings."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from l2d_framework.config.differences import differences, told
from l2d_framework.diffusion.rng import request_keys
from l2d_framework.errors import CheckpointError

IDENTITY = "__l2d_identity__"
PIECE = "loglikelihood_piece"
"""What a piece of a text that fits into the model is called among the answers."""


def content(arguments: Any) -> str:
    """Hash of what a request asks."""
    return hashlib.sha256(json.dumps(arguments, default=str).encode()).hexdigest()


def occurrences(requests: Sequence[Any]) -> list[int]:
    """How often the same question was asked before in the order of tasks and documents, whatever that of requests."""
    asked: Counter[str] = Counter()
    numbers = [0] * len(requests)
    for place in sorted(range(len(requests)), key=lambda place: _place(requests[place])):
        name = content(requests[place].args)
        numbers[place] = asked[name]
        asked[name] += 1
    return numbers


def noise_key(tokens: Sequence[int], occurrence: int) -> str:
    """Name of a request for its noise."""
    return f"{request_keys([tokens])[0].rpartition('.')[0]}.{occurrence}"


def _place(request: Any) -> tuple[str, int, int]:
    return str(request.task_name), int(request.doc_id or 0), int(request.idx or 0)


class Answers:
    """What was answered before; stands in for lm_eval's cache hook."""

    def __init__(self, store: Any, identity: dict[str, Any]) -> None:
        self._store: Any = None
        self.file = None if store is None else str(store.filename)
        if store is None:
            return
        recorded = store.get(IDENTITY)
        if recorded is None and len(store) == 0:
            store[IDENTITY] = identity
        elif recorded is None:
            raise CheckpointError(
                f"The cache {store.filename!r} holds answers of a model that is not of l2d-framework. Name another "
                "--use_cache."
            )
        elif differing := differences(recorded, identity):
            raise CheckpointError(
                f"The cache {store.filename!r} holds answers of another model or other settings ({told(differing)}). "
                "Give those of before to go on from them, or name another --use_cache."
            )
        self._store = store
        _keep_harness_out(store)

    def find(self, kind: str, arguments: Any, number: int = 0) -> Any:
        """An earlier answer, or None."""
        return None if self._store is None else self._store.recall(content([kind, arguments, number]))

    def keep(self, kind: str, arguments: Any, answer: Any, number: int = 0) -> None:
        """Remember an answer: anything that can be pickled but None."""
        if self._store is not None:
            self._store.remember(content([kind, arguments, number]), answer)

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """What lm_eval's own code calls with an answer."""
        self.keep(attr, tuple(req), res)


def _keep_harness_out(store: Any) -> None:
    # The harness names answers by the request's words alone, so that 64 repeats would share one, and asks the model
    # only about the rest. It holds this very object: from here on it finds nothing there and writes nothing into it.
    plain = type(store)

    class Store(plain):  # type: ignore[misc, valid-type]
        def __contains__(self, key: Any) -> bool:
            return False

        def __setitem__(self, key: Any, value: Any) -> None:
            pass

        def recall(self, key: str) -> Any:
            try:
                return plain.__getitem__(self, key)
            except KeyError:
                return None

        def remember(self, key: str, value: Any) -> None:
            plain.__setitem__(self, key, value)

    store.__class__ = Store
