"""Tasks that settings of token search are chosen on: those of lm_eval, over their training items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2d_framework.errors import ConfigError, suggest
from l2d_framework.evaluation.harness.run import explained, task_manager
from l2d_framework.models.unloaded import HINT


@dataclass(frozen=True)
class Question:
    """What is asked of every setting.

    Attributes:
        tasks: names of tasks, each alone or as `CATEGORY=TASK`.
        limit: first training items of each.
        metric: such as `exact_match,strict-match`; the task's first when None.
        num_fewshot: examples before a question; the task's own number when None.
        is_chat: apply the chat template, with examples as turns of the past conversation.
        folder: further tasks beside lm_eval's own.
        runs_code: consent to run code that models write.
    """

    tasks: Sequence[str]
    limit: int
    metric: str | None = None
    num_fewshot: int | None = None
    is_chat: bool = False
    folder: Path | None = None
    runs_code: bool = False


@dataclass(frozen=True)
class Trained:
    """A task that asks its training items.

    Attributes:
        name: of the task.
        category: of its settings.
        split: it takes items from.
        task: lm_eval's object.
        metric: that settings are chosen by, such as `exact_match,strict-match`.
        is_better_high: whether more of it is better.
    """

    name: str
    category: str
    split: str
    task: Any
    metric: str
    is_better_high: bool


def open_tasks(question: Question) -> list[Trained]:
    """Tasks over their training items; a category is the one named, else the task's `class_hint`, else its own name."""
    found = []
    for text in question.tasks:
        category, equals, name = text.rpartition("=")
        manager = task_manager(name, question.folder)
        if name not in manager.all_subtasks:
            raise ConfigError(f"--tasks: {name!r} is no single task of lm_eval. `l2d eval ls subtasks` lists them.")
        with explained(name):
            task = manager.load([name])["tasks"][name]
        config = task.config
        if config.output_type != "generate_until":
            raise ConfigError(
                f"--tasks: {name!r} scores given answers, so there is nothing to search for. Leave it out."
            )
        split = config.training_split or config.fewshot_split
        if split is None or split == config.test_split:
            raise ConfigError(
                f"--tasks: {name!r} names no training_split and no fewshot_split beside its test items, and settings "
                "must not be chosen on those. Add one to a copy of its task file."
            )
        config.test_split = split  # examples before a question are then never the question itself
        if config.unsafe_code and not question.runs_code:
            raise ConfigError(
                f"--tasks: {name!r} runs programs that the model writes. If you agree, add --confirm_run_unsafe_code."
            )
        _check_examples(name, task, question.num_fewshot)
        hint = (config.generation_kwargs or {}).get(HINT)
        metric = _metric(name, task, question.metric)
        is_better_high = task.higher_is_better().get(metric.partition(",")[0]) is not False
        found.append(Trained(name, category if equals else str(hint or name), split, task, metric, is_better_high))
    return found


def _check_examples(name: str, task: Any, asked: int | None) -> None:
    count = (task.config.num_fewshot or 0) if asked is None else asked
    if not count or task.fewshot_cfg.split != task.config.test_split:
        return
    most = len(list(task.fewshot_docs())) - 1
    if count > most:
        raise ConfigError(
            f"--tasks: {name!r} takes its {count} examples from the {most + 1} items that are asked here, and none is "
            f"an example for itself. Add --num_fewshot {most} or less."
        )


def _metric(name: str, task: Any, wanted: str | None) -> str:
    filters = [one.name for one in task._filters] if task.config.filter_list else ["none"]
    known = [f"{metric},{one}" for one in filters for metric in task.aggregation()]
    if wanted is None:
        return known[0]
    if wanted not in known:
        raise ConfigError(f"--metric: task {name!r} has no {wanted!r}{suggest(wanted, known) or '.'} It has {known}.")
    return wanted
