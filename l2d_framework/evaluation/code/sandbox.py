"""Runs programs written by models in processes of their own."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from l2d_framework.errors import ConfigError

ALLOW_NETWORK = "L2D_ALLOW_NETWORK_IN_SANDBOX"
"""Environment variable that lets programs run where the system offers no isolation."""

CONSENT = "HF_ALLOW_CODE_EVAL"
"""Environment variable by which a user agrees to run programs that models wrote; that of Hugging Face's metric."""

PACKAGES = ("numpy",)
"""What programs may import beside the standard library; the tests of HumanEval+ and MBPP+ do."""

_GRACE = 30.0
"""Seconds for everything around a program before its supervisor is taken for dead."""

_ROOM = "l2d-program-"

_LOGGER = logging.getLogger(__name__)
_ISOLATED = (
    "Programs written by the model run without network, with limits on time, memory and processes, with home folder, "
    "/run and /tmp hidden and all other files read-only. They share your kernel and can read what else your user can: "
    "this stops accidents, not a determined attacker."
)
_SHARED = (
    "Programs written by the model run with limits on time, memory and processes, but WITH your network and your "
    "files, which they can read, change and delete: this system offers no isolation, and you allowed that."
)


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 3.0  # of wall-clock time; also, rounded up, of processor time per process
    memory: int = 1 << 30  # bytes of address space per process, and of memory of all processes and files together
    disk: int = 64 << 20  # bytes of one file, and of all files where the program is isolated
    processes: int = 32  # and threads
    open_files: int = 64  # per process


class Sandbox:
    """Runs programs in processes of their own, with an empty environment and an own temporary folder as home.

    On Linux 5.12 or newer with user namespaces a program has no network and sees no other process; home folder, /run
    and /tmp are hidden and all other files read-only; root's programs run as nobody. The limits hold on every system,
    that on the memory of all processes together on Linux only: it is looked after twenty times a second, so a program
    can pass it for a moment, and memory behind file descriptors that no process has mapped is not seen; without
    namespaces, /dev/shm does not count either. It is protection against accidents, no security boundary: the kernel is
    shared, and files outside the hidden folders that the user may read can be read, sockets there spoken to.

    Tests that are given apart from their program run in a second process, which alone knows them and how passing is
    reported. It gets plain values, made anew from their parts, and asks the program about everything else, so neither
    walking frames nor jumping over lines nor an object that equals everything fakes a pass. What that costs: the
    program's own objects cannot be compared or calculated with values of the tests, copied or used in a `with`, its
    classes neither derived from nor named by `except`, and lists in its objects are read, not changed; tests do not see
    what it prints, seeds or changes in modules, nor it what they do there; its constants are read once; and a call
    takes a tenth of a millisecond or more. Tests that need this stand at the end of their program, alone with it in one
    process: it cannot pass by exiting early, but one that means to deceive finds there how passing is reported. Helpers
    that tests take from the program instead of bringing their own, and functions of theirs that they hand to it and
    call, do what the program wants.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    @cached_property
    def is_isolated(self) -> bool:
        """Whether programs run without network; False where they cannot and that is allowed."""
        answer = self.obstacle()
        if answer is None:
            _LOGGER.warning(_ISOLATED)
            return True
        if os.environ.get(ALLOW_NETWORK) != "1":
            raise ConfigError(
                f"This system cannot run programs without network ({answer}), so none written by a model is run. Use "
                "Linux 5.12 or newer with user namespaces (containers often forbid them), or accept the risk with "
                f"`l2d eval --allow-network-in-sandbox` or {ALLOW_NETWORK}=1."
            )
        _LOGGER.warning(_SHARED)
        return False

    def obstacle(self) -> str | None:
        """What keeps programs from running without network here, found by running an empty one; None for nothing."""
        answer = self._outcome("", is_isolated=True)
        return None if answer == "passed" else answer

    def run(self, program: str, tests: str = "") -> str:
        """Run Python source, which passes when its last line and that of its tests have run; says how it ended."""
        answer = self._outcome(program, tests, is_isolated=self.is_isolated)
        if answer.startswith("refused: "):
            raise ConfigError(f"A program could not be isolated: {answer}. Fewer parallel workers may help.")
        return answer

    def run_all(self, programs: Sequence[tuple[str, str]], *, workers: int, bar: tqdm) -> list[str]:
        """Run several programs at a time."""
        if programs and self.is_isolated is not None:
            with ThreadPoolExecutor(max_workers=workers) as pool:
                return [(answer, bar.update())[0] for answer in pool.map(self.run, *zip(*programs, strict=True))]
        return []

    def _outcome(self, program: str, tests: str = "", *, is_isolated: bool) -> str:
        with _own_room(tempfile.gettempdir()) as room:
            Path(room, "home").mkdir()
            Path(room, "packages").mkdir()
            folders = _package_folders()
            for folder in folders:
                Path(room, "packages", os.path.basename(folder)).symlink_to(folder)
            job = {
                "program": program,
                "tests": tests,
                "has_tests": bool(tests.strip()),
                "token": secrets.token_hex(16),
                "is_isolated": is_isolated,
                "room": room,
                "limits": asdict(self.limits),
                "packages": folders,
                "hidden": sorted({"/run", os.path.expanduser("~")} - {"/", "/tmp"}),
                "source": _source("apart.py"),
                **_interpreter(),
            }
            return _supervised(job, self.limits.seconds + _GRACE)


@contextmanager
def _own_room(parent: str) -> Iterator[str]:
    """A folder that is locked as long as it is used, so that what a killed caller left behind can be told."""
    _clear(parent)
    while True:
        room = tempfile.mkdtemp(prefix=_ROOM, dir=parent)
        if (lock := _locked(room, waits=True)) is not None:
            break
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)
        os.close(lock)


@cache
def _clear(parent: str) -> None:
    """Remove the rooms of this user's callers that were killed; once per process."""
    for entry in os.scandir(parent):
        try:
            is_mine = entry.name.startswith(_ROOM) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
            if is_mine and (lock := _locked(entry.path, waits=False)) is not None:
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(lock)
        except OSError:
            continue


def _locked(room: str, *, waits: bool) -> int | None:
    """Descriptor that locks a folder until it is closed or its process ends; None where another has or removed it."""
    import fcntl

    try:
        descriptor = os.open(room, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        # Between its making and its locking another caller may have taken it for left behind.
        if os.path.exists(room):
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def _supervised(job: dict[str, Any], seconds: float) -> str:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _source("sandbox_child.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        start_new_session=True,
        text=True,
    )
    try:
        answer, complaint = process.communicate(json.dumps(job), timeout=seconds)
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return answer or f"failed: {complaint.strip()[-300:]}"


@cache
def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _interpreter() -> dict[str, str]:
    """Folder of the Python that runs this, and its program in there, whatever environment it was started from."""
    prefix = os.path.realpath(sys.base_prefix)
    program = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return {"prefix": prefix, "python": os.path.relpath(program, prefix)}


def _package_folders() -> list[str]:
    folders = []
    for spec in map(find_spec, PACKAGES):
        if spec is not None and spec.submodule_search_locations:
            folder = Path(spec.submodule_search_locations[0]).resolve()
            # Wheels keep the shared libraries of a package beside it.
            folders += [str(path) for path in (folder, folder.with_name(f"{spec.name}.libs")) if path.is_dir()]
    return folders
