"""Exact match with its standard error, and what may be said of a difference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_framework.demo.task import Question

Marks = NDArray[np.bool_]
"""Right or wrong, one entry per question."""


@dataclass(frozen=True)
class Score:
    """A mean over questions.

    Attributes:
        mean: the mean.
        error: its standard error.
    """

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"

    @property
    def is_clear(self) -> bool:
        """Whether the mean is further from zero than two standard errors."""
        return abs(self.mean) > 2 * self.error


def score(marks: Marks) -> Score:
    """Share of right answers.

    Args:
        marks: of each question, (N,).

    Returns:
        The share p and sqrt(p (1 - p) / N).
    """
    share = float(marks.mean())
    return Score(share, float(np.sqrt(share * (1 - share) / len(marks))))


def difference(first: Marks, second: Marks) -> Score:
    """How much better the second does than the first on the same questions.

    Pairing the questions removes what they have in common, such as being hard.

    Args:
        first: of each question, (N,).
        second: of the same questions, (N,).

    Returns:
        Mean and standard error of the differences.
    """
    gaps = second.astype(float) - first.astype(float)
    return Score(float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(len(gaps))))


@dataclass(frozen=True)
class Sheet:
    """Answers to a set of questions.

    Attributes:
        questions: what was asked.
        answers: what was answered, as text.
        evaluations: network evaluations spent on each answer.
    """

    questions: list[Question]
    answers: list[str]
    evaluations: list[int]

    @property
    def marks(self) -> Marks:
        """Right or wrong, (N,)."""
        pairs = zip(self.questions, self.answers, strict=True)
        return np.array([question.completion == answer for question, answer in pairs])


@dataclass(frozen=True)
class Outcome:
    """How one way of answering fares.

    Attributes:
        model: `base`, `lora` or `l2d`.
        solver: name of the solver; None where nothing is solved.
        new: answers about the new skill.
        old: answers about the other skills.
    """

    model: str
    solver: str | None
    new: Sheet
    old: Sheet

    @property
    def evaluations(self) -> float:
        """Mean network evaluations per answer about the new skill."""
        return float(np.mean(self.new.evaluations))
