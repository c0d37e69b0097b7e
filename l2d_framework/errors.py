"""Errors a user can cause; each says what was wrong, the value, and what to do."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import signal
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import ClassVar, NoReturn
from urllib.parse import unquote, urlsplit

EXIT_CODES = {
    0: "done",
    1: "an error that nobody foresaw, with its traceback; of `l2d bench`, a cell without its number",
    2: "a mistake in a run file, an option, data or a checkpoint",
    3: "training diverged: a loss, a gradient or a weight is no number any more",
    4: "what was to be written could not be written, such as to a full disk",
    5: "another process is at work in the same output folder",
    6: "a data source stopped answering; what was trained until then is saved",
    130: "interrupted by Ctrl-C",
    138: "interrupted by SIGUSR1, by which Slurm announces the end of a job's time",
    143: "interrupted by SIGTERM",
}
"""What the exit codes of `l2d` say; `docs/training.md` shows them."""


class L2DError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code: ClassVar[int] = 2
    """With which the command `l2d` ends."""


class ConfigError(L2DError, ValueError):
    """A run file, option or argument is wrong; raised before any weights are loaded."""


class MissingModelError(ConfigError):
    """Where a language model is looked for there is none."""


class PluginError(L2DError, ValueError):
    """A component is unknown, broken, clashes with another or lacks its extra."""


class DataError(L2DError, ValueError):
    """A data source, column or example cannot be used."""


class UnreachableError(DataError):
    """A data source does not answer any more, such as one behind a network."""

    exit_code = 6


class CheckpointError(L2DError, ValueError):
    """A checkpoint is incomplete, corrupted, or belongs to another base model."""


class UnsupportedModelError(L2DError, ValueError):
    """A backbone cannot serve this language model."""


class EvaluationBudgetError(L2DError, RuntimeError):
    """An adaptive solve needed more network evaluations than it was allowed."""


class DivergedError(L2DError, ArithmeticError):
    """A loss, a gradient or a weight became infinite or no number while training."""

    exit_code = 3


class OutputError(L2DError, OSError):
    """A file or folder could not be written, whatever library was writing it."""

    exit_code = 4


class BusyError(L2DError, RuntimeError):
    """Another process is at work in an output folder."""

    exit_code = 5


class Interrupted(KeyboardInterrupt):
    """A signal asked to end; what it says tells how to go on."""

    def __init__(self, signum: int, text: str = "") -> None:
        super().__init__(text)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """With which the command `l2d` ends, as a shell reports a process that the signal ended."""
        return 128 + self.signum


_PROCESS = os.getpid()


def interrupt(signum: int = signal.SIGINT, frame: object = None) -> NoReturn:
    """Handler that turns a signal into an exception.

    Args:
        signum: the signal.
        frame: where it came.

    Raises:
        Interrupted: always.
    """
    if os.getpid() != _PROCESS:  # a worker that was forked since, and has nothing to say
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    raise Interrupted(signum)


def shown(value: object) -> str:
    """A value as a message shows it.

    Args:
        value: what the user wrote.

    Returns:
        Its repr, cut to 80 characters.
    """
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def suggest(name: str, known: Iterable[str]) -> str:
    """Sentence fragment that offers the closest known names.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Returns:
        "; did you mean 'x'?" or "" when nothing is close.
    """
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def install(extra: str) -> str:
    """Command that adds an extra to a distribution, from the clone that it was installed from if there is one.

    Args:
        extra: such as `l2d-framework[plots]`.

    Returns:
        The command, for a shell.
    """
    name, _, rest = extra.partition("[")
    clone, options = _clone(name)
    if clone is None:
        return f"pip install {shlex.quote(extra)}"
    own = clone / rest.removesuffix("]")  # a distribution of its own, which no index may have yet
    target = str(own) if rest and (own / "pyproject.toml").is_file() else f"{clone}[{rest}" if rest else str(clone)
    return f"pip install {options}{shlex.quote(target)}"


def _clone(name: str) -> tuple[Path | None, str]:
    """Folder that a distribution was installed from, and pip's option if it still lives there."""
    try:
        origin = json.loads(metadata.distribution(name).read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None, ""
    if "dir_info" not in origin:
        return None, ""
    folder = Path(unquote(urlsplit(origin["url"]).path))
    return folder if folder.is_dir() else None, "--editable " if origin["dir_info"].get("editable") else ""
