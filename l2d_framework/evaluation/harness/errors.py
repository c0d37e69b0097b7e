"""What tasks need and the machine lacks, in words that say what to do."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from types import TracebackType

from l2d_framework.errors import ConfigError, DataError, L2DError, PluginError, suggest


def explain(error: BaseException) -> L2DError | None:
    """An error of lm_eval in this package's words; None where nothing is known to say."""
    cause: BaseException | None = error
    while cause is not None:
        if known := _explain(cause):
            return known
        cause = cause.__cause__ or cause.__context__
    return None


def _explain(error: BaseException) -> L2DError | None:
    if isinstance(error, L2DError):
        return error
    if isinstance(error, (OSError, ValueError)):
        text = str(error)
        if unreached := re.search(
            r"Couldn't reach '([^']+)' on the Hub|Dataset '([^']+)' doesn't exist on the Hub", text
        ):
            name = unreached[1] or unreached[2]
            return DataError(
                f"The data set {name!r} cannot be reached ({error}). Go online once, or give it as the folder "
                f"{str(Path(name).resolve())!r}: a folder named like a data set is read instead of the hub."
            )
        if unsafe := re.search(r"run task: (\S+) which is marked as unsafe", text):
            return ConfigError(
                f"The task {unsafe[1]!r} runs programs that the model writes. If you agree, pass "
                "--confirm_run_unsafe_code."
            )
        if unknown := re.match(r"Tasks not found: (.+)$", text):
            return ConfigError(_unknown_tasks([name.strip() for name in unknown[1].split(",")]))
    if isinstance(error, ModuleNotFoundError) and error.name and (extra := _extra(error.name)):
        return PluginError(f"A task needs {error.name!r}, which is not installed. Run: pip install 'lm_eval[{extra}]'")
    return None


def _unknown_tasks(names: list[str]) -> str:
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    said = [f"lm_eval knows no task {name!r}{suggest(name, known) or '.'}" for name in names]
    where = (
        "`lm_eval ls tasks` lists all; tasks of your own need --include_path FOLDER, or the path of their YAML file."
    )
    return " ".join([*said, where])


def _extra(module: str) -> str | None:
    """Extra of lm_eval that brings a package."""
    package = re.sub(r"[-_.]+", "-", module.partition(".")[0]).lower()
    for line in metadata.requires("lm_eval") or []:
        extra = re.match(r"([\w.-]+).*\bextra == [\"']([\w-]+)[\"']", line)
        if extra and re.sub(r"[-_.]+", "-", extra[1]).lower() == package:
            return extra[2]
    return None


def show_errors() -> None:
    """End this process with one line instead of a traceback where `explain` knows what to say."""
    before = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if known := explain(error):
            sys.stderr.write(f"Error: {known}\n")
        else:
            before(kind, error, trace)

    sys.excepthook = show
