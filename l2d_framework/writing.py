"""Files and folders that are written whole or not at all, and errors that name what could not be written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from l2d_framework.errors import L2DError, OutputError

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
WRITING, REPLACED = ".writing", ".replaced"
"""Behind the names of folders that are not whole yet, and that are about to go."""
_TORCH = os.path.join("torch", "serialization.py")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, so that one that is there is complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    with naming_what_fails(path, temporary):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)


def _elsewhere() -> str:
    return "Make room first, or write elsewhere."


@contextmanager
def staged(
    target: Path,
    *,
    writes: bool = True,
    wait: Callable[[], None] = lambda: None,
    advice: Callable[[], str] = _elsewhere,
) -> Iterator[Path]:
    """Write a folder under a temporary name and give it its own when the block ends without an error.

    One process `writes`, that is, makes and renames it; `wait` waits for the others; `advice` is given where it fails.
    """
    stage = target.with_name(target.name + WRITING)
    with naming_what_fails(target, stage, advice):
        if writes:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
        wait()
        yield stage
    wait()
    if writes:
        # Whatever had the name is removed once the new one is in place.
        replaced = target.with_name(target.name + REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            os.replace(target, replaced)
        os.replace(stage, target)
        shutil.rmtree(replaced, ignore_errors=True)
    wait()


@contextmanager
def naming_what_fails(target: Path, stage: Path, advice: Callable[[], str] = _elsewhere) -> Iterator[None]:
    """Say which `target` could not be written and why, and give back the room of its unfinished `stage`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, L2DError) or (why := _why(error, stage)) is None:
            raise
        room = size_of(stage)
        if stage.is_dir():
            shutil.rmtree(stage, ignore_errors=True)
        else:
            stage.unlink(missing_ok=True)
        raise OutputError(
            f"{str(target)!r} could not be written: {why}, after {in_bytes(room)} of it. {advice()}"
        ) from error


def _why(error: Exception, stage: Path) -> str | None:
    """Why a file could not be written, or None if that is not what is wrong."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _UNWRITABLE else None
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    # Neither library is imported here; both turn what the disk says into errors of their own.
    if any(name.endswith(_TORCH) for name in frames) or type(error).__name__ == "SafetensorError":
        # One library has the system's words in its own, the other none.
        known = (os.strerror(number) for number in _UNWRITABLE)
        return next((words for words in known if words in str(error)), None) or _probe(stage.parent) or str(error)
    return None


def _probe(folder: Path) -> str | None:
    """Why a megabyte cannot be written, or None if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        return error.strerror
    return None


def in_bytes(count: float) -> str:
    """A number of bytes for readers."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def size_of(path: Path) -> int:
    """Bytes of a file or of all files of a folder; 0 if there is none."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def speed(tokens_per_second: float) -> str:
    """Tokens per second for readers: two digits where they are few."""
    return f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second >= 10 else f"{tokens_per_second:.2g} tokens/s"
