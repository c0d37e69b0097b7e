"""Where the data of tasks came from: a folder named like a hub id is read instead of the hub."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_FILES = ("json", "csv", "parquet", "text")


def data_sources(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Data source of each task.

    Args:
        names: of tasks whose requests this process has seen.

    Returns:
        By task: `dataset_path`, `dataset_name` and `local_folder`, which is None for data of the hub or its cache.
    """
    # The harness hands a model requests and no way back to their task.
    from lm_eval.api.task import ConfigurableTask

    wanted, found = set(names), {}
    for thing in gc.get_objects():
        if issubclass(type(thing), ConfigurableTask) and thing.config.task in wanted:
            path = thing.config.dataset_path
            found[thing.config.task] = {
                "dataset_path": path,
                "dataset_name": thing.config.dataset_name,
                "local_folder": _local(path, thing.config.dataset_kwargs or {}),
            }
    return {name: found[name] for name in sorted(found)}


def _local(path: str | None, options: dict[str, Any]) -> str | None:
    if path is None:
        return None
    if path in _FILES and ("data_files" in options or "data_dir" in options):
        return str(options.get("data_dir") or options.get("data_files"))
    return str(Path(path).resolve()) if Path(path).is_dir() else None
