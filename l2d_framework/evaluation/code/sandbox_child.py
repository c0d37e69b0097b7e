"""Sets up isolation and limits around one program, and says how it ended.

Its text is handed to `python -I -S -c`, so it imports nothing but the standard library and no file of this package is
read from inside. The supervisor keeps time and memory, the jailer enters new namespaces, and prisoners, started anew
with limits and an empty environment, run `apart.py`: one the program and one its tests, or one both.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
import types
from typing import Any

_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""
_NO_SUID, _NO_DEVICES, _BIND, _RECURSIVE, _PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _HERE, _WITH_ALL_BELOW, _READ_ONLY = 442, -100, 0x8000, 1
_PARENT_DEATH_SIGNAL, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 36, 38
_NOBODY = 65534
_ROOM, _SHARED_MEMORY = "/tmp", "/dev/shm"
_OFTEN = 0.05
"""Seconds between looks at time and memory."""


def _checked(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(libc: Any, source: str, target: str, kind: str | None, *, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _checked(libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _cover(libc: Any, folder: str, size: int, mode: int) -> None:
    """Put an empty file system in memory over a folder."""
    if os.path.isdir(folder):
        options = f"size={size},nr_inodes=4096,mode={mode:o}"
        _mount(libc, "tmpfs", folder, "tmpfs", flags=_NO_SUID | _NO_DEVICES, options=options)


def _protect(libc: Any, folder: str, *, and_below: bool) -> None:
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NO_SUID, 0, 0, 0)
    below = _WITH_ALL_BELOW if and_below else 0
    _checked(libc.syscall(_MOUNT_SETATTR, _HERE, folder.encode(), below, attributes, 32), "mount_setattr")


def _furnish(libc: Any, job: dict[str, Any], owner: int) -> None:
    """Make every file read-only and hide some; a small file system in memory with home, Python and packages is left."""
    sources = {"python": job["prefix"], **{f"packages/{os.path.basename(path)}": path for path in job["packages"]}}
    opened = {name: os.open(path, os.O_PATH) for name, path in sources.items()}
    _mount(libc, "none", "/", None, flags=_RECURSIVE | _PRIVATE)
    _protect(libc, "/", and_below=True)
    for hidden in (*job["hidden"], _ROOM):
        _cover(libc, hidden, 4096, 0o755)
    for name, descriptor in opened.items():
        os.makedirs(f"{_ROOM}/{name}")
        _mount(libc, f"/proc/self/fd/{descriptor}", f"{_ROOM}/{name}", None, flags=_BIND | _RECURSIVE)
        os.close(descriptor)
    os.mkdir(f"{_ROOM}/home")
    _cover(libc, "/proc", 4096, 0o755)
    # What the tests import lies under these, so not even their owner may put something else there.
    for hidden in (*job["hidden"], _ROOM, "/proc"):
        if os.path.isdir(hidden):
            _protect(libc, hidden, and_below=False)
    _cover(libc, f"{_ROOM}/home", job["limits"]["disk"], 0o700)
    os.chown(f"{_ROOM}/home", owner, owner if owner == _NOBODY else -1)
    _cover(libc, _SHARED_MEMORY, job["limits"]["memory"] // 2, 0o1777)


def _limit(limits: dict[str, Any], running: int) -> None:
    for name, value in (
        ("AS", limits["memory"]),
        ("CPU", int(limits["seconds"]) + 1),
        ("FSIZE", limits["disk"]),
        ("NPROC", running + limits["processes"] + 1),  # the tests have a process, too
        ("NOFILE", limits["open_files"]),
        ("CORE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            resource.setrlimit(kind, (value, value))


def _running() -> int:
    """Threads of this user, which an older kernel or one without namespaces counts against the limit."""
    count = 0
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        try:
            if entry.isdecimal() and os.stat(f"/proc/{entry}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{entry}/task"))
        except OSError:
            continue
    return count


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _reaches_everyone(path: str) -> bool:
    """Whether other users than root may execute a file; where nothing is isolated, root's programs run as nobody."""
    folders = path.split("/")[1:]
    return all(os.stat("/" + "/".join(folders[:depth])).st_mode & 1 for depth in range(1, len(folders) + 1))


def _imprison(job: dict[str, Any], task: tuple[str, ...], room: str, running: int) -> None:
    """Become a prisoner: never returns."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    what, *descriptors = task
    for descriptor in descriptors:
        os.set_inheritable(int(descriptor), True)
    os.setsid()
    home, prefix = f"{room}/home", job["prefix"] if room != _ROOM else f"{room}/python"
    os.chdir(home)
    _limit(job["limits"], running)
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **one}
    environment["LD_LIBRARY_PATH"] = f"{prefix}/lib"
    python = f"{prefix}/{job['python']}"
    os.execve(python, [python, "-I", "-S", "-c", job["source"], what, f"{room}/packages", *descriptors], environment)


def _tasks(job: dict[str, Any], descriptors: tuple[int, int]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """What the program's process does, and that of the tests if they have one."""
    outside = tuple(map(str, descriptors))
    if not job["has_tests"]:
        return ("alone", *outside), None
    (asked, ask), (answers, answer) = ((str(end) for end in os.pipe()) for _ in range(2))
    return ("program", asked, answer), ("tests", *outside, answers, ask)


def _jail(job: dict[str, Any], descriptors: tuple[int, int], report: int, mapped: int) -> None:
    """Enter new namespaces and wait there for the prisoner, with whom everything inside ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.unshare(_NAMESPACES), "unshare")
    os.write(report, b"?")
    owner = int(os.read(mapped, 16))
    _furnish(libc, job, owner)
    task, tests = _tasks(job, descriptors)
    alive, own = os.pipe()
    first = os.fork()
    if first == 0:
        os.close(own)
    elif tests is None:
        for descriptor in (*descriptors, report):
            os.close(descriptor)
        os.waitpid(first, 0)
        os._exit(0)
    if owner != os.getuid():
        _become(owner)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if first and tests:
        # Outside the new process namespace, where the program can reach neither it nor its memory.
        os.set_inheritable(own, True)
        _imprison(job, tests, _ROOM, 0)
    # A change of user would take this back, so it comes after.
    libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)  # the jailer died before its death could be noticed
    prisoner = os.fork()
    if prisoner == 0:
        _imprison(job, task, _ROOM, 0)
    # The first process of a namespace takes no signal from inside, so it is not the prisoner; with it all others end.
    for descriptor in (*descriptors, report):
        os.close(descriptor)
    while os.wait()[0] != prisoner:
        pass
    os._exit(0)


def _map(pid: int) -> int:
    """Give a process in new namespaces its user; where that is root, one without its rights, whom limits bind."""
    user, group = os.geteuid(), os.getegid()
    plain = (f"{user} {user} 1", f"{group} {group} 1", user)
    both = f"0 0 1\n{_NOBODY} {_NOBODY} 1"
    for users, groups, owner in ((both, both, _NOBODY), plain) if user == 0 else (plain,):
        try:
            if owner != _NOBODY or user != 0:
                with open(f"/proc/{pid}/setgroups", "w") as file:
                    file.write("deny")
            for name, text in (("gid_map", groups), ("uid_map", users)):
                with open(f"/proc/{pid}/{name}", "w") as file:
                    file.write(text)
            return owner
        except OSError as error:
            refusal = error
    raise refusal


def _descendants() -> set[int]:
    parents = {}
    for entry in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            with open(f"/proc/{entry}/stat") as file:
                parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {os.getpid()}


def _signal(processes: set[int], number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def _bury() -> None:
    """End what the program left behind; orphans become children of the supervisor."""
    try:
        while True:
            os.waitpid(-1, os.WNOHANG)
            stopped: set[int] = set()
            # Those that multiply are stopped before the first is ended and makes room for another.
            while new := _descendants() - stopped:
                _signal(new, signal.SIGSTOP)
                stopped |= new
            _signal(stopped, signal.SIGKILL)
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def _family() -> list[int]:
    """As `_descendants`, but quickly where the kernel keeps lists of children."""
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        return list(_descendants())
    family = [os.getpid()]
    for process in family:
        try:
            for thread in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{thread}/children") as file:
                    family += map(int, file.read().split())
        except OSError:
            continue
    return family[1:]


def _resident(process: int, *, is_exact: bool) -> int:
    """Bytes of memory of a process; where that is to be exact, of what it shares only its share."""
    try:
        if is_exact:
            with open(f"/proc/{process}/smaps_rollup") as file:
                return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
        with open(f"/proc/{process}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except PermissionError:
        return _resident(process, is_exact=False) if is_exact else 0
    except (OSError, StopIteration):
        return 0


def _in_files(process: int) -> int:
    """Bytes of memory under a prisoner's files."""
    total = 0
    for folder in (_SHARED_MEMORY, f"{_ROOM}/home"):
        try:
            state = os.statvfs(f"/proc/{process}/root{folder}")
            total += (state.f_blocks - state.f_bfree) * state.f_frsize
        except OSError:
            continue
    return total


def _uses_too_much(child: int, job: dict[str, Any]) -> bool:
    """Whether all processes and files together hold more memory than one process may; the quick look shows most."""
    family, most = _family(), job["limits"]["memory"]
    files = _in_files(child) if job["is_isolated"] else 0
    return all(files + sum(_resident(one, is_exact=exact) for one in family) > most for exact in (False, True))


def _attend(child: int, job: dict[str, Any], descriptor: int) -> str:
    """Hand over the program; why it had to be ended, if it had to."""
    end = time.monotonic() + job["limits"]["seconds"]

    def look(number: int, frame: types.FrameType | None) -> None:
        if time.monotonic() >= end:
            raise TimeoutError
        if _uses_too_much(child, job):
            raise MemoryError
        signal.setitimer(signal.ITIMER_REAL, _OFTEN)

    signal.signal(signal.SIGALRM, look)
    try:
        signal.setitimer(signal.ITIMER_REAL, min(_OFTEN, job["limits"]["seconds"]))
        try:
            with open(descriptor, "wb") as file:
                file.write(
                    json.dumps({name: job[name] for name in ("program", "tests", "token", "is_isolated")}).encode()
                )
        except BrokenPipeError:
            pass
        os.waitpid(child, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except (TimeoutError, MemoryError) as error:
        _signal({child}, signal.SIGKILL)
        return "timed out" if isinstance(error, TimeoutError) else "failed: MemoryError: of all its processes together"
    return ""


def supervise(job: dict[str, Any]) -> str:
    """Run a job in a process of its own: "passed", "timed out", or "failed: " or "refused: " and why."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    (job_out, job_in), (answer_out, answer_in) = os.pipe(), os.pipe()
    (report_out, report_in), (mapped_out, mapped_in) = os.pipe(), os.pipe()
    running = 0 if job["is_isolated"] else _running()
    child = os.fork()
    if child == 0:
        for descriptor in (job_in, answer_out, report_out, mapped_in):
            os.close(descriptor)
        try:
            if job["is_isolated"]:
                _jail(job, (job_out, answer_in), report_in, mapped_out)
            if os.getuid() == 0 and _reaches_everyone(f"{job['prefix']}/{job['python']}"):
                os.chmod(job["room"], 0o711)
                os.chown(f"{job['room']}/home", _NOBODY, _NOBODY)
                _become(_NOBODY)
            task, tests = _tasks(job, (job_out, answer_in))
            if tests is not None and os.fork():
                task = tests
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
            _imprison(job, task, job["room"], running)
        except Exception as error:
            os.write(report_in, f"refused: {error}".encode())
        os._exit(1)
    for descriptor in (job_out, answer_in, report_in, mapped_out):
        os.close(descriptor)
    # The report ends, empty, when the prisoner's interpreter is started: from then on nothing on it can be trusted.
    report = os.read(report_out, 1)
    if report == b"?":
        try:
            os.write(mapped_in, str(_map(child)).encode())
            report = os.read(report_out, 1)
        except OSError as error:
            _signal({child}, signal.SIGKILL)
            return f"refused: no user in the new namespace: {error}"
    if report:
        return (report + os.read(report_out, 500)).decode(errors="replace")
    cut_short = _attend(child, job, job_in)
    _bury()
    os.set_blocking(answer_out, False)
    try:
        said = os.read(answer_out, 4096).decode(errors="replace")
    except BlockingIOError:
        said = ""
    if cut_short:
        return cut_short
    if said == job["token"]:
        return "passed"
    return said if said.startswith("failed: ") else "failed: it ended before its last line had run"


if __name__ == "__main__":
    sys.stdout.write(supervise(json.load(sys.stdin)))
