"""Choosing the settings of token search per category of tasks, on training items."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.utils import simple_parse_args_string

from l2d_framework.config.differences import differences, told
from l2d_framework.config.files import parse_json, read_text
from l2d_framework.errors import ConfigError, suggest
from l2d_framework.evaluation.harness.model import L2DLM
from l2d_framework.evaluation.harness.run import explained, task_identity, task_manager
from l2d_framework.evaluation.search.search import OPTIONS, PREFIX, Search
from l2d_framework.models.unloaded import HINT
from l2d_framework.training.folder_lock import locked_file
from l2d_framework.writing import write_whole


@dataclass(frozen=True)
class Question:
    """What is asked of every setting."""

    tasks: Sequence[str]  # each alone or as `CATEGORY=TASK`
    limit: int  # first training items of each
    metric: str | None = None  # such as `exact_match,strict-match`; the task's first when None
    num_fewshot: int | None = None
    is_chat: bool = False  # with examples as turns of the past conversation
    folder: Path | None = None  # of further tasks
    runs_code: bool = False  # consent to run code that models write


@dataclass(frozen=True)
class Trained:
    """A task that asks its training items."""

    name: str
    category: str
    split: str
    task: Any
    metric: str
    is_better_high: bool


def open_tasks(question: Question) -> list[Trained]:
    """Tasks over their training items; a category is the one named, else the task's `class_hint`, else its own name."""
    trained = []
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
        trained.append(Trained(name, category if equals else str(hint or name), split, task, metric, is_better_high))
    return trained


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


Track = Callable[[Sequence[Any]], Iterable[Any]]
"""Passes what is left to do through and shows how far it is."""


@dataclass
class Tuning:
    """Rows measured so far, kept in a file after each."""

    path: Path
    identity: dict[str, Any]
    tasks: Sequence[Trained]
    settings: Sequence[Search]
    rows: list[dict[str, Any]] = field(default_factory=list)  # a task, settings, score, its error, number of items

    def read(self) -> None:
        """Take over the rows of an earlier run."""
        if not self.path.exists():
            return
        try:
            earlier = parse_json(read_text(self.path), str(self.path))
            identity, rows = dict(earlier["identity"]), [dict(row) for row in earlier["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--out {str(self.path)!r} exists and is no result of this command ({error}). Name another."
            ) from error
        if differing := differences(identity, json.loads(json.dumps(self.identity))):
            raise ConfigError(
                f"--out {str(self.path)!r} holds rows of another model or another question ({told(differing)}). Name "
                "another file."
            )
        self.rows = rows

    def find(self, task: str, settings: Search) -> dict[str, Any] | None:
        """A row, or None while it is missing."""
        wanted = settings.model_dump()
        return next((row for row in self.rows if row["task"] == task and row["settings"] == wanted), None)

    def best(self) -> dict[str, Any]:
        """By category measured completely, the settings with the best mean score over its tasks."""
        chosen = {}
        for category in dict.fromkeys(task.category for task in self.tasks):
            means = [self._mean(category, one) for one in self.settings]
            known = [value for value in means if value is not None]
            if len(known) == len(means):
                chosen[category] = self.settings[known.index(max(known))].model_dump()
        return chosen

    def _mean(self, category: str, settings: Search) -> float | None:
        """Mean score over tasks, negative where less is better; None while a row is missing."""
        tasks = [task for task in self.tasks if task.category == category]
        rows = [(task, self.find(task.name, settings)) for task in tasks]
        scores = [row["score"] * (1 if task.is_better_high else -1) for task, row in rows if row is not None]
        return sum(scores) / len(scores) if len(scores) == len(tasks) else None

    def write(self) -> dict[str, Any]:
        """Write everything known; the best settings by category."""
        best = self.best()
        text = json.dumps({"identity": self.identity, "categories": best, "rows": self.rows}, indent=2)
        write_whole(self.path, text + "\n")
        return best


def open_model(arguments: str, device: str | None = None) -> L2DLM:
    """The model of `--model_args`; its weights are loaded later."""
    options: dict[str, Any] = simple_parse_args_string(arguments)
    if given := sorted(set(options) & set(OPTIONS)):
        raise ConfigError(f"--model_args names {given}, which this command is to choose. Leave them out.")
    return L2DLM(**({} if device is None else {"device": device}), **options)


def grid(
    beams: int, powers: Sequence[float], penalties: Sequence[float], temperatures: Sequence[float]
) -> list[Search]:
    """All combinations."""
    return [
        Search(beams=beams, length_power=power, repetition_penalty=penalty, temperature=temperature)
        for power, penalty, temperature in itertools.product(powers, penalties, temperatures)
    ]


def tune(
    lm: L2DLM, question: Question, settings: Sequence[Search], *, out: Path, track: Track = lambda left: left
) -> dict[str, Any]:
    """Measure every setting on every task; returns and writes the best of each category, the first on a tie.

    Called again with the same model and question it measures only what the file lacks. The score of the chosen settings
    is the best of many on the very items they were chosen on, so it is optimistic; measure them on test items.
    """
    tasks = open_tasks(question)
    tuning = Tuning(out, _identity(lm, question, tasks), tasks, settings)
    with locked_file(out, "--out"):
        tuning.read()
        tuning.write()  # fails here, if it does, and not after the first row
        for task, one in track([(t, s) for s in settings for t in tasks if tuning.find(t.name, s) is None]):
            tuning.rows.append(_measure(lm, question, task, one))
            tuning.write()
        return tuning.write()


def _identity(lm: L2DLM, question: Question, tasks: Sequence[Trained]) -> dict[str, Any]:
    return lm.identity() | {
        "limit": question.limit,
        "num_fewshot": question.num_fewshot,
        "is_chat": question.is_chat,
        "tasks": {
            task.name: {
                "category": task.category,
                "split": task.split,
                "metric": task.metric,
                "is_better_high": task.is_better_high,
                "content": task_identity(task.name, question.folder),
            }
            for task in tasks
        },
    }


def _measure(lm: L2DLM, question: Question, trained: Trained, settings: Search) -> dict[str, Any]:
    with explained(trained.name):
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
    if not _is_number(table.get(trained.metric)):
        raise ConfigError(f"Task {trained.name!r} gave no number as {trained.metric!r}. Name another --metric.")
    name, _, kind = trained.metric.partition(",")
    error = table.get(f"{name}_stderr,{kind}")
    return {
        "task": trained.name,
        "settings": settings.model_dump(),
        "metric": trained.metric,
        "score": float(table[trained.metric]),
        "error": float(error) if _is_number(error) else None,
        "items": results["n-samples"][trained.name]["effective"],
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
