"""Where the data of tasks came from: a folder named like a hub id is read instead of the hub."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_FILES = ("json", "csv", "parquet", "text")


def named_tasks(names: Iterable[str]) -> list[Any]:
    """Tasks of lm_eval that are loaded in this process."""
    # The harness hands a model requests and no way back to their task.
    from lm_eval.api.task import ConfigurableTask

    wanted = set(names)
    things = [thing for thing in gc.get_objects() if issubclass(type(thing), ConfigurableTask)]
    return [thing for thing in things if thing.config.task in wanted]


def data_sources(tasks: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """By task: `dataset_path`, `dataset_name`, and `local_folder`, None for data of the hub or its cache."""
    found = {}
    for task in tasks:
        path = task.config.dataset_path
        found[task.config.task] = {
            "dataset_path": path,
            "dataset_name": task.config.dataset_name,
            "local_folder": local_folder(path, task.config.dataset_kwargs or {}),
        }
    return {name: found[name] for name in sorted(found)}


def local_folder(path: str | None, options: dict[str, Any]) -> str | None:
    """Folder or files of a data set on this machine; None for data of the hub or its cache."""
    if path is None:
        return None
    if path in _FILES and ("data_files" in options or "data_dir" in options):
        return str(options.get("data_dir") or options.get("data_files"))
    return str(Path(path).resolve()) if Path(path).is_dir() else None
