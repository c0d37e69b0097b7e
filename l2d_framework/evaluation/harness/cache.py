"""lm_eval's `--use_cache` made safe: answers of another model or other settings are refused, repeats keep apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from l2d_framework.errors import CheckpointError
from l2d_framework.evaluation.harness.request_ids import content

IDENTITY = "__l2d_identity__"


class Answers:
    """What was answered before; stands in for lm_eval's cache hook."""

    def __init__(self, store: Any, identity: dict[str, Any]) -> None:
        self._store: Any = None
        if store is None:
            return
        recorded = store.get(IDENTITY)
        if recorded is None and len(store) == 0:
            store[IDENTITY] = identity
        elif recorded != identity:
            known = recorded or {}
            differing = sorted(n for n in known | identity if known.get(n) != identity.get(n))
            raise CheckpointError(
                f"The cache {store.filename!r} holds answers of another model or of other settings; they differ in "
                f"{differing}. Name another --use_cache."
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
