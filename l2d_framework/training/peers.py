"""Processes of one run hear when another has failed alone, which would leave them waiting for it for ever."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate.state import PartialState, is_initialized

from l2d_framework.errors import ConfigError

POLL, GRACE = 5.0, 15.0
"""Seconds between two looks, and for a process to end by itself, as where all have met the same error."""
_COUNT = itertools.count()
# Runs of this process, which are those of the others, too.


def own_gpu() -> str:
    """The GPU of this process, which has the number of the process on its machine; refused if there is none."""
    # Once lm_eval serves several processes, LOCAL_RANK is the number of this one among all.
    number = PartialState().local_process_index if is_initialized() else int(os.environ["LOCAL_RANK"])
    count = torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"There are more processes on this machine than GPUs, which are {count}. Start {count}, or choose "
            "--device cpu."
        )
    return f"cuda:{number}"


def _end(text: str) -> None:
    # The main thread may wait in a library for what never comes, so nothing gentler would end it.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())
    os._exit(1)


class Peers:
    """While it is entered, an error of one process ends the others; nothing happens where there is one process only."""

    def __init__(
        self,
        store: Any = None,
        rank: int = 0,
        *,
        key: str = "",
        poll: float = POLL,
        grace: float = GRACE,
        end: Callable[[str], None] = _end,
    ) -> None:
        self._store, self._rank, self._poll, self._grace, self._end = store, rank, poll, grace, end
        self._left, self._key = threading.Event(), f"l2d_failed_{key}"

    @classmethod
    def of_this_run(cls) -> Peers:
        """Those that the launcher has started, as far as they have found each other."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.distributed_c10d._get_default_store(), dist.get_rank(), key=str(next(_COUNT)))

    def __enter__(self) -> Self:
        if self._store is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._left.set()
        if error is not None and self._store is not None:
            text = f"Process {self._rank} of the run has failed: {str(error) or type(error).__name__}"
            with suppress(RuntimeError):  # the process that keeps the store has ended before
                if not self._store.check([self._key]):
                    self._store.set(self._key, text)

    def _watch(self) -> None:
        while not self._left.wait(self._poll):
            if (why := self._failure()) is not None:
                if not self._left.wait(self._grace):
                    self._end(f"{why} Process {self._rank} cannot go on without it and ends, too.")
                return

    def _failure(self) -> str | None:
        try:
            return self._store.get(self._key).decode() if self._store.check([self._key]) else None
        except RuntimeError:
            return "The process that all processes of the run meet at has ended."
