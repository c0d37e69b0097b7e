"""Wording of the L2D paper's questions and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

Row = Mapping[str, Any]


def listed(question: str, options: Sequence[str], labels: Sequence[str]) -> str:
    """A question and its options, one a line.

    Args:
        question: its text.
        options: their texts.
        labels: their names.

    Returns:
        Several lines, each ended.
    """
    lines = [f"{label}. {text}" for label, text in zip(labels, options, strict=True)]
    return "\n".join(["Question:", question, "Choices:", *lines, ""])


def labels_of(row: Row) -> list[str]:
    """Names of the options of a question.

    Args:
        row: of MMLU, MMLU-Pro, ARC or PIQA.

    Returns:
        Those of the data set, else capital letters.
    """
    if "goal" in row:
        return ["A", "B"]
    if "options" in row:
        return list(ascii_uppercase[: len(row["options"])])
    if isinstance(row["choices"], Mapping):
        return list(row["choices"]["label"])
    return list(ascii_uppercase[: len(row["choices"])])


def label_of(row: Row) -> str:
    """Name of the right option.

    Args:
        row: of MMLU, MMLU-Pro, ARC or PIQA.

    Returns:
        One of its labels.
    """
    if "answerKey" in row:
        return str(row["answerKey"])
    if "goal" in row:
        return labels_of(row)[row["label"]]
    return str(row["answer"]) if "options" in row else labels_of(row)[row["answer"]]


def mmlu(row: Row) -> str:
    """A question of MMLU.

    Args:
        row: of the data set.

    Returns:
        The turn of the user.
    """
    return f"{listed(row['question'], row['choices'], labels_of(row))}\nAnswer:"


def mmlu_pro(row: Row) -> str:
    """A question of MMLU-Pro.

    Args:
        row: of the data set.

    Returns:
        The turn of the user, which ends with the options.
    """
    return listed(row["question"], row["options"], labels_of(row)).rstrip("\n")


def arc(row: Row) -> str:
    """A question of ARC.

    Args:
        row: of the data set.

    Returns:
        The turn of the user.
    """
    return f"{listed(row['question'], row['choices']['text'], labels_of(row))}\nAnswer:"


def piqa(row: Row) -> str:
    """A question of PIQA.

    Args:
        row: of the data set.

    Returns:
        The turn of the user.
    """
    return f"Goal:\n{row['goal']}\nOptions:\nA. {row['sol1']}\nB. {row['sol2']}\n\nAnswer:"


def mbpp(row: Row) -> str:
    """A problem of MBPP: a docstring of its description and first test.

    Args:
        row: of the data set.

    Returns:
        The turn of the user.
    """
    return f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""\n'


def completed_context(row: Row) -> str:
    """An example's turn of the assistant in InstructHumanEval: the context of the function, then its body.

    Args:
        row: of the data set.

    Returns:
        Python source.
    """
    context = row["context"]
    return f"{context}{'' if context.endswith(chr(10)) else chr(10)}{row['canonical_solution']}"
