"""Choosing the settings of token search per category of tasks, on training items."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.utils import simple_parse_args_string

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.lm_eval.adapter import L2DLM
from l2d_framework.evaluation.lm_eval.harness import task_manager
from l2d_framework.evaluation.lm_eval.source import HINT
from l2d_framework.evaluation.search import OPTIONS, PREFIX, Search

Track = Callable[[Sequence[Any]], Iterable[Any]]
"""Passes what is left to do through and shows how far it is."""


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
    """

    name: str
    category: str
    split: str
    task: Any


@dataclass
class Tuning:
    """Rows measured so far, kept in a file after each.

    Attributes:
        path: of the file.
        identity: what every row depends on.
        rows: a task, settings, score, its standard error and the number of items each.
    """

    path: Path
    identity: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> None:
        """Take over the rows of an earlier run.

        Raises:
            ConfigError: if the file is another's.
        """
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            earlier, rows = found["identity"], found["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--out {str(self.path)!r} exists and is no result of this command ({error}). Name another."
            ) from error
        if earlier != json.loads(json.dumps(self.identity)):
            differing = sorted(n for n in self.identity if earlier.get(n) != self.identity[n])
            raise ConfigError(
                f"--out {str(self.path)!r} holds rows of another model or another question; they differ in "
                f"{differing}. Name another file."
            )
        self.rows = rows

    def find(self, task: str, settings: Search) -> dict[str, Any] | None:
        """A row.

        Args:
            task: its task.
            settings: its settings.

        Returns:
            The row, or None while it is missing.
        """
        wanted = settings.model_dump()
        return next((row for row in self.rows if row["task"] == task and row["settings"] == wanted), None)

    def write(self, categories: Mapping[str, Any]) -> None:
        """Write everything known.

        Args:
            categories: the best settings of each finished category.
        """
        text = json.dumps({"identity": self.identity, "categories": categories, "rows": self.rows}, indent=2)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stage = self.path.with_name(self.path.name + ".part")
        stage.write_text(text + "\n", encoding="utf-8")
        os.replace(stage, self.path)


def open_model(arguments: str, device: str | None = None) -> L2DLM:
    """The model of `--model_args`; its weights are loaded later.

    Args:
        arguments: such as `pretrained=PATH,num_inference_steps=7`.
        device: where it is to run; the GPU when there is one for None.

    Returns:
        The model.

    Raises:
        ConfigError: if they say how to search.
    """
    options: dict[str, Any] = simple_parse_args_string(arguments)
    if given := sorted(set(options) & set(OPTIONS)):
        raise ConfigError(f"--model_args names {given}, which this command is to choose. Leave them out.")
    return L2DLM(**({} if device is None else {"device": device}), **options)


def open_tasks(question: Question) -> list[Trained]:
    """Tasks over their training items.

    Args:
        question: names them.

    Returns:
        One for each name; its category is the one named, else the task's `class_hint`, else its own name.

    Raises:
        ConfigError: if a task is unknown, is a group, does not generate or has no training items.
    """
    found = []
    for text in question.tasks:
        category, equals, name = text.rpartition("=")
        manager = task_manager(name, question.folder)
        if name not in manager.all_subtasks:
            raise ConfigError(f"--tasks: {name!r} is no single task of lm_eval. `l2d eval ls subtasks` lists them.")
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
        hint = (config.generation_kwargs or {}).get(HINT)
        found.append(Trained(name, category if equals else str(hint or name), split, task))
    return found


def grid(
    beams: int, powers: Sequence[float], penalties: Sequence[float], temperatures: Sequence[float]
) -> list[Search]:
    """All combinations.

    Args:
        beams: hypotheses.
        powers: of the length.
        penalties: on repetition.
        temperatures: of the final pick.

    Returns:
        Settings, validated.
    """
    return [
        Search(beams=beams, length_power=power, repetition_penalty=penalty, temperature=temperature)
        for power, penalty, temperature in itertools.product(powers, penalties, temperatures)
    ]


def tune(
    lm: L2DLM, question: Question, settings: Sequence[Search], *, out: Path, track: Track = lambda left: left
) -> dict[str, Any]:
    """Measure every setting on every task and write the best of each category.

    Called again with the same model and question it goes on where it was interrupted, and measures only what the file
    lacks. The score of the chosen settings is the best of many on the very items they were chosen on, so it is
    optimistic; measure them on test items.

    Args:
        lm: the model.
        question: what to ask.
        settings: to choose from; where several score the same, the first wins.
        out: JSON file, which `search=FILE` of the adapter takes.
        track: shows progress.

    Returns:
        Best settings by category.
    """
    tasks = open_tasks(question)
    tuning = Tuning(out, _identity(lm, question, tasks))
    tuning.read()
    left = [(t, s) for s in settings for t in tasks if tuning.find(t.name, s) is None]
    for task, one in track(left):
        tuning.rows.append(_measure(lm, question, task, one))
        tuning.write(best(tuning, tasks, settings))
    chosen = best(tuning, tasks, settings)
    tuning.write(chosen)
    return chosen


def _identity(lm: L2DLM, question: Question, tasks: Sequence[Trained]) -> dict[str, Any]:
    return {
        "model": lm.source.identity(),
        "sampling": lm.settings.model_dump(mode="json"),
        "limit": question.limit,
        "metric": question.metric,
        "num_fewshot": question.num_fewshot,
        "is_chat": question.is_chat,
        "tasks": {task.name: {"category": task.category, "split": task.split} for task in tasks},
    }


def _measure(lm: L2DLM, question: Question, trained: Trained, settings: Search) -> dict[str, Any]:
    results = simple_evaluate(
        lm,
        tasks=[trained.task],
        num_fewshot=question.num_fewshot,
        limit=question.limit,
        gen_kwargs={PREFIX + name: value for name, value in settings.model_dump().items()},
        apply_chat_template=question.is_chat,
        fewshot_as_multiturn=question.is_chat,
        task_manager=task_manager(trained.name, question.folder),  # a new one takes ten seconds
        bootstrap_iters=100,  # only for metrics that are no means over items; none at all would drop every error
        log_samples=False,
        confirm_run_unsafe_code=question.runs_code,
    )
    assert results is not None  # of the first process, and there is one only
    table = results["results"][trained.name]
    metrics = [key for key, value in table.items() if "," in key and "_stderr," not in key and _is_number(value)]
    chosen = question.metric or metrics[0]
    if chosen not in metrics:
        raise ConfigError(f"--metric: task {trained.name!r} has no {chosen!r}. Choose from {metrics}.")
    name, _, kind = chosen.partition(",")
    error = table.get(f"{name}_stderr,{kind}")
    return {
        "task": trained.name,
        "settings": settings.model_dump(),
        "metric": chosen,
        "score": float(table[chosen]),
        "error": float(error) if _is_number(error) else None,
        "items": results["n-samples"][trained.name]["effective"],
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def best(tuning: Tuning, tasks: Sequence[Trained], settings: Sequence[Search]) -> dict[str, Any]:
    """Best settings of each category that has been measured completely.

    Args:
        tuning: the rows.
        tasks: their tasks.
        settings: to choose from.

    Returns:
        By category, fields of `Search`: those with the highest mean score over its tasks.
    """
    found = {}
    for category in dict.fromkeys(task.category for task in tasks):
        means = [mean(tuning, [t for t in tasks if t.category == category], one) for one in settings]
        known = [value for value in means if value is not None]
        if len(known) == len(settings):
            found[category] = settings[known.index(max(known))].model_dump()
    return found


def mean(tuning: Tuning, tasks: Sequence[Trained], settings: Search) -> float | None:
    """Mean score of settings over tasks.

    Args:
        tuning: the rows.
        tasks: of one category.
        settings: what was measured.

    Returns:
        The mean; None while a row is missing.
    """
    rows = [tuning.find(task.name, settings) for task in tasks]
    scores = [row["score"] for row in rows if row is not None]
    return sum(scores) / len(scores) if len(scores) == len(tasks) else None
