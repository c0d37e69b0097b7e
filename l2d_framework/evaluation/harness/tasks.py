"""Tasks of lm_eval: where their data came from, what they lack here, and that their programs run in the sandbox."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from l2d_framework.errors import ConfigError, DataError
from l2d_framework.evaluation.code import metric
from l2d_framework.evaluation.code.sandbox import CONSENT

_FILES = ("json", "csv", "parquet", "text")
_EXECUTOR = "check_correctness"
"""Function by which CRUXEval's tasks execute a program, with this signature: program, timeout -> whether it passed."""


def named_tasks(names: Iterable[str]) -> list[Any]:
    """Tasks of lm_eval that are loaded in this process."""
    # The harness hands a model requests and no way back to their task.
    from lm_eval.api.task import ConfigurableTask

    wanted, kinds = set(names), _kinds(ConfigurableTask)
    # By type alone, since asking each of some hundred thousand objects what it is an instance of takes seconds.
    return [thing for thing in gc.get_objects() if type(thing) in kinds and thing.config.task in wanted]


def _kinds(kind: type[Any]) -> set[type[Any]]:
    lower: list[type[Any]] = kind.__subclasses__()
    return {kind}.union(*map(_kinds, lower))


def data_sources(tasks: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """By task: `dataset_path`, `dataset_name`, and `local_folder`, None for data of the hub or its cache."""
    return {
        config.task: {
            "dataset_path": config.dataset_path,
            "dataset_name": config.dataset_name,
            "local_folder": local_folder(config.dataset_path, config.dataset_kwargs or {}),
        }
        for config in sorted((task.config for task in tasks), key=lambda config: str(config.task))
    }


def local_folder(path: str | None, options: dict[str, Any]) -> str | None:
    """Folder or files of a data set on this machine; None for data of the hub or its cache."""
    if path is None:
        return None
    if path in _FILES and ("data_files" in options or "data_dir" in options):
        return str(options.get("data_dir") or options.get("data_files"))
    return str(Path(path).resolve()) if Path(path).is_dir() else None


def check_sentence_data(task: Any) -> None:
    """Refuse a task of IFEval whose checks could not split an answer into sentences."""
    # Its registry of instructions is what the checks of every variant share.
    if "instructions_registry" not in getattr(task.config.process_results, "__globals__", {}):
        return
    import nltk  # type: ignore[import-untyped]

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError as error:
        raise DataError(
            f"The task {task.config.task!r} splits answers into sentences with NLTK's data 'punkt_tab', which are not "
            "here. Run: python -m nltk.downloader punkt_tab; or place the folder as 'tokenizers/punkt_tab' in one of "
            f"{nltk.data.path}, which NLTK_DATA adds to."
        ) from error


def route(task: Any) -> None:
    """Make a task that executes programs do so in the sandbox, or refuse it."""
    if not task.config.unsafe_code:
        return
    # lm_eval keeps `function.__call__`, which knows the function but not where it was written.
    functions = [getattr(f, "__self__", f) for f in (*task._metric_fn_list.values(), task.config.process_results)]
    namespaces: list[dict[str, Any]] = [f.__globals__ for f in functions if hasattr(f, "__globals__")]
    for namespace in namespaces:
        if _EXECUTOR in namespace:
            namespace[_EXECUTOR] = metric.passes
    if not any(
        isinstance(value, metric.CodeEval) or value is metric.passes for names in namespaces for value in names.values()
    ):
        raise ConfigError(
            f"The task {task.config.task!r} executes programs in a way of its own, outside the sandbox, so the model "
            "'l2d' does not run it. Let its metric use evaluate.load('code_eval')."
        )
    # Without the user's consent lm_eval would not have come here; the metric asks for it in words of its own.
    os.environ[CONSENT] = "1"
    _ = metric.SANDBOX.is_isolated  # found out, and said, now
