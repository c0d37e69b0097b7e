"""lm_eval inside this process: one task of one model, as plain numbers with standard errors and scores per item."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from l2d_framework.errors import ConfigError, suggest
from l2d_framework.evaluation.harness.errors import explain
from l2d_framework.evaluation.harness.model import L2DLM
from l2d_framework.evaluation.harness.tasks import local_folder
from l2d_framework.evaluation.hub import is_reachable
from l2d_framework.evaluation.statistics import standard_error
from l2d_framework.registry import extensions


@dataclass(frozen=True)
class ModelChoice:
    """A model and how to open it."""

    pretrained: str
    options: dict[str, Any] = field(default_factory=dict)  # further ones of `--model_args`
    device: str = "cpu"
    batch_size: int | str = 1


@dataclass(frozen=True)
class TaskChoice:
    """A task and how it is asked, in the words of lm_eval's command line."""

    task: str
    limit: int | None = None  # first items of each task
    num_fewshot: int | None = None
    chat: str = "none"  # "template", or "multiturn" with examples as past turns; only where the model has a template
    generation: dict[str, Any] = field(default_factory=dict)  # as in `--gen_kwargs`
    runs_code: bool = False  # consent to run code that models write


@dataclass(frozen=True)
class Answered:
    """What a task gave."""

    values: dict[str, dict[str, Any]]  # by `metric,filter`; `scores` are None where it is no mean of the items
    details: dict[str, Any]  # what the adapter says of itself, cost and data among it; versions of tasks


_NAME = re.compile(rb"""^(?:task|group): *["']?([^\s"']+)""", re.MULTILINE)


@cache
def _index(folder: Path | None, *, near: Path | None = None, has_defaults: bool = False) -> TaskManager:
    # What comes later wins.
    places = [*([] if near is None else [near]), *_folders(folder)]
    return TaskManager(include_path=[str(place) for place in places], include_defaults=has_defaults)


@cache
def _places() -> dict[str, set[Path]]:
    """By name, the folders of lm_eval in which a file is a task or group of this name."""
    found: dict[str, set[Path]] = {}
    for path in Path(lm_eval.__file__).parent.glob("tasks/**/*.yaml"):
        for name in _NAME.findall(path.read_bytes()):
            found.setdefault(name.decode(), set()).add(path.parent)
    return found


def _folders(folder: Path | None) -> list[Path]:
    return [*extensions().task_folders(), *([] if folder is None else [folder])]


def task_manager(name: str, folder: Path | None = None) -> TaskManager:
    """An index in which a task can be found: of few folders where that is enough, since all 14,000 take seconds."""
    small = _index(folder)
    if all("task" in config for config in _configs(name, small)):
        return small
    if len(places := _places().get(name, set())) == 1:
        small = _index(folder, near=next(iter(places)))
        if all("task" in config for config in _configs(name, small, has_tags=False)):
            return small
    return _index(folder, has_defaults=True)


@contextmanager
def explained(task: str) -> Iterator[None]:
    """Say in this package's words what ends lm_eval."""
    try:
        yield
    except Exception as error:
        if (known := explain(error)) is not None:
            raise known from error
        if isinstance(error, ValueError):
            raise ConfigError(f"Task {task!r}: {error}") from error
        raise


def evaluate(model: ModelChoice, task: TaskChoice, *, folder: Path | None = None) -> Answered:
    """Answer a task; `folder`: further tasks beside lm_eval's own and those of plugins."""
    lm = L2DLM(model.pretrained, device=model.device, batch_size=model.batch_size, **model.options)
    with explained(task.task):
        results = simple_evaluate(
            lm,
            tasks=[task.task],
            num_fewshot=task.num_fewshot,
            limit=task.limit,
            gen_kwargs=dict(task.generation) or None,
            apply_chat_template=task.chat != "none" and lm.tokenizer.chat_template is not None,
            fewshot_as_multiturn=task.chat == "multiturn",
            task_manager=task_manager(task.task, folder),
            bootstrap_iters=1000,  # for the standard error of a metric that is no mean over items
            confirm_run_unsafe_code=task.runs_code,
        )
    assert results is not None  # of the first process, and there is one only
    return _answered(task.task, results, lm)


def _answered(name: str, results: Mapping[str, Any], lm: L2DLM) -> Answered:
    table = results["results"].get(name) or results.get("groups", {}).get(name) or {}
    subtasks = list(_leaves(name, results["group_subtasks"]))
    samples = [sample for task in subtasks for sample in results["samples"].get(task, [])]
    items = sum(results["n-samples"][task]["effective"] for task in subtasks if task in results["n-samples"])
    values = {}
    for key, value in table.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        scores = _scores(samples, metric, chosen)
        if scores is None or not math.isclose(sum(scores) / len(scores), value, rel_tol=1e-6, abs_tol=1e-9):
            scores = None
        error = table.get(f"{metric}_stderr,{chosen}")
        values[key] = {
            "value": float(value),
            "error": standard_error(scores) if scores else float(error) if isinstance(error, (int, float)) else None,
            "items": items,
            "scores": scores,
        }
    info = lm.get_model_info()["l2d"]
    facts = {name: results[name] for name in ("versions", "n-shot", "n-samples") if name in results}
    return Answered(values, {"l2d": info, **facts})


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    children = groups.get(name) or []
    if not children:
        yield name
    for child in children:
        yield from _leaves(child, groups)


def _scores(samples: Sequence[Mapping[str, Any]], metric: str, chosen: str) -> list[float] | None:
    """Score of each item, if the metric gives each a number."""
    scores: list[Any] = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
    if not scores or not all(isinstance(score, (bool, int, float)) for score in scores):
        return None
    return [float(score) for score in scores]


def check_task(name: str, folder: Path | None = None) -> list[str]:
    """Look for a task; returns its data sets that would have to be downloaded."""
    manager = task_manager(name, folder)
    if name not in manager.task_index:
        raise ConfigError(f"Unknown task {name!r}{suggest(name, manager.all_tasks) or '.'} See `l2d eval ls tasks`.")
    missing = set()
    for config in _configs(name, manager):
        path, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
        if path is not None and "custom_dataset" not in config and not local_folder(path, options):
            missing |= set() if is_reachable(path, "dataset") else {str(path)}
    return sorted(missing)


def _configs(name: str, manager: TaskManager, *, has_tags: bool = True) -> Iterator[dict[str, Any]]:
    """Settings of the tasks below a name; an empty one for each that the index lacks, or may lack by its tag."""
    entry = manager.task_index.get(name)
    if entry is None or (entry.yaml_path is None and not has_tags):
        yield {}
    elif entry.yaml_path is None:
        for task in sorted(entry.tags):
            yield from _configs(task, manager)
    elif not isinstance((entry.cfg or {}).get("task"), list):
        yield dict(entry.cfg or {})
    else:
        for child in entry.cfg["task"]:
            changes = {} if isinstance(child, str) else child
            below = child if isinstance(child, str) else str(child.get("task"))
            yield from ({**config, **changes} for config in _configs(below, manager, has_tags=has_tags))


def task_identity(name: str, folder: Path | None = None) -> str:
    """Fingerprint of what a task asks and how it scores: a result of another wording is another result."""
    manager = task_manager(name, folder)
    text = json.dumps(list(_configs(name, manager)), sort_keys=True, default=str)
    # Functions are named by their files; where those are installed changes nothing.
    folders = _folders(folder)
    for place in (Path(lm_eval.__file__).parent, *folders):
        text = text.replace(str(place), "")
    digest = hashlib.sha256(text.encode())
    entry = manager.task_index.get(name)
    beside = None if entry is None or entry.yaml_path is None else entry.yaml_path.parent
    if beside is not None and any(beside.is_relative_to(place) for place in folders):
        for path in sorted(beside.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
