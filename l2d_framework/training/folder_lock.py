"""One process at a time in an output folder; a lock ends with the process that holds it, however that ends."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from l2d_framework.errors import BusyError, OutputError
from l2d_framework.training.run_record import now

LOCK, HOLDER = ".lock", ".lock.json"
FILES = {LOCK, HOLDER}
_PATIENCE = 15.0
"""Seconds for the children of a dead process, such as workers that load data, to end after it and give up its lock."""
_LOGGER = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Work alone in an output folder, made when missing; one in which nothing was written is removed again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Where the lock stands now, even should the folder be renamed meanwhile.
        lock = FileLock(folder / LOCK)
        _acquire(lock, folder)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
        (folder / HOLDER).write_text(json.dumps(holder) + "\n", encoding="utf-8")
    except OSError as error:
        if isinstance(error, (BusyError, Timeout)):
            raise
        raise OutputError(
            f"output_dir {str(folder)!r} cannot be written ({error.strerror or error}). Choose another."
        ) from error
    try:
        yield
    finally:
        forget(folder)
        lock.release()
        with suppress(OSError):  # it holds what was written
            folder.rmdir()


def forget(folder: Path) -> None:
    """Remove the files of a lock that is held, or whose folder has got another name."""
    for name in FILES:
        with suppress(OSError):
            (folder / name).unlink()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:  # a network's file system without locks
        _LOGGER.warning("%s has no locks: see to it that only one process trains in %s.", folder.parent, folder)
    except Timeout:
        holder = _holder(folder)
        if holder.get("host") == socket.gethostname() and not psutil.pid_exists(int(holder["pid"])):
            with suppress(Timeout):
                lock.acquire(timeout=_PATIENCE)
                return
        raise BusyError(_refusal(folder, holder)) from None


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if holder:
        who = f"process {holder['pid']} on {holder['host']!r}, since {holder['since']}"
    return (
        f"output_dir {str(folder)!r} is in use by {who}. Wait until it has ended, end it, or choose another output_dir."
    )


def _holder(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return {"pid": int(found["pid"]), "host": str(found["host"]), "since": str(found["since"])}
    except (OSError, ValueError, KeyError, TypeError):  # it has not written it yet
        return {}
