"""One process at a time in an output folder; a lock ends with the process that holds it, however that ends."""

from __future__ import annotations

import json
import logging
import multiprocessing
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
"""Seconds for the children of a dead process, such as those that load data or train for it, to end after it."""
_LOGGER = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, option: str = "output_dir") -> Iterator[None]:
    """Work alone in an output folder, made when missing; one in which nothing was written is removed again.

    `option`: by which a user names the folder.
    """
    with _said(folder, option):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _held(folder, folder / LOCK, folder / HOLDER, option):
            yield
    finally:
        with suppress(OSError):  # it holds what was written
            folder.rmdir()


@contextmanager
def locked_file(file: Path, option: str) -> Iterator[None]:
    """Work alone on a file, whose folder is made when missing; `option`: by which a user names it."""
    with _said(file, option):
        file.parent.mkdir(parents=True, exist_ok=True)
    with _held(file, file.with_name(f".{file.name}{LOCK}"), file.with_name(f".{file.name}{HOLDER}"), option):
        yield


def forget(folder: Path) -> None:
    """Remove the files of a lock whose folder has got another name."""
    _remove(folder / LOCK, folder / HOLDER)


@contextmanager
def _held(target: Path, place: Path, holder: Path, option: str) -> Iterator[None]:
    lock = FileLock(place)
    with _said(target, option):
        _acquire(lock, holder, f"{option} {str(target)!r}")
        parent = multiprocessing.parent_process()
        pids = {"pid": os.getpid(), "parent": None if parent is None else parent.pid}
        facts = {**pids, "host": socket.gethostname(), "since": now()}
        holder.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    try:
        yield
    finally:
        _remove(place, holder)
        lock.release()


@contextmanager
def _said(target: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{option} {str(target)!r} cannot be written ({error.strerror or error}). Choose another."
        ) from error


def _remove(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _acquire(lock: FileLock, holder: Path, what: str) -> None:
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:  # a network's file system without locks
        _LOGGER.warning("%s lies where there are no locks: see to it that only one process writes to it.", what)
    except Timeout:
        known = _read(holder)
        if known.get("host") == socket.gethostname() and any(map(_has_ended, known["pids"])):
            with suppress(Timeout):
                lock.acquire(timeout=_PATIENCE)
                return
        who = f"process {known['pids'][0]} on {known['host']!r}, since {known['since']}" if known else "another process"
        option = what.partition(" ")[0]
        raise BusyError(
            f"{what} is in use by {who}. Wait until it has ended, end it, or choose another {option}."
        ) from None


def _read(holder: Path) -> dict[str, Any]:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        pids = [int(pid) for pid in (found["pid"], found.get("parent")) if pid is not None]
        return {"pids": pids, "host": str(found["host"]), "since": str(found["since"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it has not written it yet
        return {}


def _has_ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
