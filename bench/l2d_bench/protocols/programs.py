"""Scores of programs: pass@1, pass@5 and pass@10 of ten samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l2d_framework.evaluation.code.metric import CodeEval

# Under this name the adapter sees that the task executes programs in the sandbox.
_METRIC = CodeEval()
_TRIES = (1, 5, 10)


def every_sample(answers: list[list[str]], rows: Sequence[Any]) -> list[list[str]]:
    """A filter that keeps all samples; lm_eval's own keeps the first.

    Args:
        answers: per item, its samples.
        rows: the items.

    Returns:
        `answers`.
    """
    return answers


def human_eval(row: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Run completions of a function.

    Args:
        row: of InstructHumanEval.
        results: its samples, in a list of one.

    Returns:
        "pass@k" for each k that there are samples for.
    """
    return _pass_at([row["prompt"] + sample for sample in results[0]], f"{row['test']}\ncheck({row['entry_point']})")


def mbpp(row: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Run solutions of a problem with all its tests.

    Args:
        row: of MBPP.
        results: its samples, in a list of one.

    Returns:
        "pass@k" for each k that there are samples for.
    """
    return _pass_at(list(results[0]), "\n".join(row["test_list"]))


def _pass_at(programs: list[str], tests: str) -> dict[str, float]:
    found, _ = _METRIC.compute(predictions=[programs], references=[tests], k=_TRIES)
    return dict(found)
