"""Every way in which tasks of lm_eval execute programs leads through the sandbox, or the task is refused."""

from __future__ import annotations

import os
from typing import Any

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.code.metric import CodeEval, check_isolation, passes
from l2d_framework.evaluation.code.sandbox import CONSENT

_EXECUTOR = "check_correctness"
"""Function by which CRUXEval's tasks execute a program, with this signature: program, timeout -> whether it passed."""


def route(task: Any) -> None:
    """Make a task that executes programs do so in the sandbox."""
    if not task.config.unsafe_code:
        return
    found = [namespace for namespace in map(_namespace, _functions(task)) if namespace is not None]
    for namespace in found:
        if _EXECUTOR in namespace:
            namespace[_EXECUTOR] = passes
    if not any(namespace.get(_EXECUTOR) is passes or _has_metric(namespace) for namespace in found):
        raise ConfigError(
            f"The task {task.config.task!r} executes programs in a way of its own, outside the sandbox, so the model "
            "'l2d' does not run it. Let its metric use evaluate.load('code_eval')."
        )
    # Without the user's consent lm_eval would not have come here; the metric asks for it in words of its own.
    os.environ[CONSENT] = "1"
    check_isolation()


def _functions(task: Any) -> list[Any]:
    return [*task._metric_fn_list.values(), task.config.process_results]


def _namespace(function: Any) -> dict[str, Any] | None:
    # lm_eval keeps `function.__call__`, which knows the function but not where it was written.
    return getattr(getattr(function, "__self__", function), "__globals__", None)


def _has_metric(namespace: dict[str, Any]) -> bool:
    return any(isinstance(value, CodeEval) or value is passes for value in namespace.values())
