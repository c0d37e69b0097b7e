"""Scores of the L2D paper: accuracy, and how often an answer could be read at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l2d_bench.protocols.answers import boxed, marked_number, math_answer, option, same_math
from l2d_bench.protocols.prompts import label_of, labels_of


def gsm8k(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer to GSM8K.

    Args:
        row: the item.
        results: its answer.

    Returns:
        "acc", whether the marked number is written as the reference's, and "format_acc", whether there is one.
    """
    found = marked_number(results[0])
    return {"acc": float(found == marked_number(row["answer"])), "format_acc": float(found is not None)}


def math(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    r"""Score an answer to MATH.

    Args:
        row: the item.
        results: its answer.

    Returns:
        "acc", and "format_acc", whether something is `\boxed`.
    """
    found, wanted = math_answer(results[0]), math_answer(row["solution"])
    is_right = found is not None and wanted is not None and same_math(found, wanted)
    return {"acc": float(is_right), "format_acc": float(boxed(results[0]) is not None)}


def options(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer to a question with options.

    Args:
        row: the item.
        results: its answer.

    Returns:
        "acc", and "format_acc", whether it names an option of the question.
    """
    found = option(results[0], labels_of(row))
    return {"acc": float(found == label_of(row)), "format_acc": float(found is not None)}
