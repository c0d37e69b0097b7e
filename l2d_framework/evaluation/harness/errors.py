"""What tasks need and the machine lacks, in words that say what to do."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from l2d_framework.errors import ConfigError, DataError, L2DError, PluginError, suggest

_UNREACHED = re.compile(r"Couldn't reach '([^']+)' on the Hub|Dataset '([^']+)' doesn't exist on the Hub")
_UNSAFE = re.compile(r"run task: (\S+) which is marked as unsafe")
_UNKNOWN = re.compile(r"^Tasks not found: (.+)$")
_SENTENCES = "tokenizers/punkt_tab/english"


def explain(error: BaseException) -> L2DError | None:
    """An error of lm_eval in this package's words; None where nothing is known to say."""
    cause: BaseException | None = error
    while cause is not None:
        if found := _explain(cause):
            return found
        cause = cause.__cause__ or cause.__context__
    return None


def _explain(error: BaseException) -> L2DError | None:
    if isinstance(error, L2DError):
        return error
    if isinstance(error, (OSError, ValueError)):
        if found := _UNREACHED.search(str(error)):
            name = found[1] or found[2]
            return DataError(
                f"The data set {name!r} cannot be reached ({error}). Go online once, or give it as the folder "
                f"{str(Path(name).resolve())!r}: a folder named like a data set is read instead of the hub."
            )
        if unsafe := _UNSAFE.search(str(error)):
            return ConfigError(
                f"The task {unsafe[1]!r} runs programs that the model writes. If you agree, pass "
                "--confirm_run_unsafe_code."
            )
        if unknown := _UNKNOWN.match(str(error)):
            return ConfigError(_unknown_tasks([name.strip() for name in unknown[1].split(",")]))
    if isinstance(error, ModuleNotFoundError) and error.name and (extra := _extra(error.name)):
        return PluginError(f"A task needs {error.name!r}, which is not installed. Run: pip install 'lm_eval[{extra}]'")
    return None


def _unknown_tasks(names: list[str]) -> str:
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    said = " ".join(f"lm_eval knows no task {name!r}{suggest(name, known) or '.'}" for name in names)
    return (
        f"{said} `lm_eval ls tasks` lists all; tasks of your own need --include_path FOLDER, or "
        "the path of their YAML file."
    )


def _extra(module: str) -> str | None:
    """Extra of lm_eval that brings a package."""
    package = re.sub(r"[-_.]+", "-", module.partition(".")[0]).lower()
    for line in metadata.requires("lm_eval") or []:
        found = re.match(r"([\w.-]+).*\bextra == [\"']([\w-]+)[\"']", line)
        if found and re.sub(r"[-_.]+", "-", found[1]).lower() == package:
            return found[2]
    return None


def check_sentence_data(task: Any) -> None:
    """Refuse a task of IFEval whose checks could not split an answer into sentences."""
    # Its registry of instructions is what the checks of every variant share.
    if "instructions_registry" not in getattr(task.config.process_results, "__globals__", {}):
        return
    import nltk  # type: ignore[import-untyped]

    try:
        nltk.data.find(_SENTENCES)
    except LookupError as error:
        raise DataError(
            f"The task {task.config.task!r} splits answers into sentences with NLTK's data 'punkt_tab', which are not "
            "here. Run: python -m nltk.downloader punkt_tab; or place the folder as 'tokenizers/punkt_tab' in one of "
            f"{nltk.data.path}, which NLTK_DATA adds to."
        ) from error


def show_errors() -> None:
    """End this process with one line instead of a traceback where `explain` knows what to say."""
    before = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if found := explain(error):
            sys.stderr.write(f"Error: {found}\n")
        else:
            before(kind, error, trace)

    sys.excepthook = show
