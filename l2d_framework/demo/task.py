"""A text task made on the spot: one number computed from fifteen others, the computation named by a word or two."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

NUMBERS = 64
"""Numbers run from 0 to 63; each becomes one token, and so does the answer."""
LENGTH = 15
"""How many numbers a question holds."""

OPERATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "largest": max,
    "smallest": min,
    "second largest": lambda numbers: sorted(numbers)[-2],
    "second smallest": lambda numbers: sorted(numbers)[1],
    "mean": lambda numbers: sum(numbers) // len(numbers),
    "median": lambda numbers: sorted(numbers)[len(numbers) // 2],
}
"""What is asked, and how it is answered; the mean is rounded down."""
NEW = "median"
"""The skill that finetuning is to add; the base model sees it rarely."""
OLD = tuple(name for name in OPERATIONS if name != NEW)
"""The skills the base model has."""


@dataclass(frozen=True)
class Question:
    """One question; equal questions have equal answers.

    Attributes:
        operation: a key of `OPERATIONS`.
        numbers: what it is applied to.
    """

    operation: str
    numbers: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """Text up to the answer."""
        return f"{self.operation} {' '.join(map(str, self.numbers))} ="

    @property
    def completion(self) -> str:
        """Text of the answer."""
        return f" {OPERATIONS[self.operation](self.numbers)}"


class Questions:
    """A source of questions that never asks the same one twice, so that what is drawn later is held out.

    Args:
        seed: of all questions.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._asked: set[Question] = set()

    def draw(self, count: int, shares: dict[str, float]) -> list[Question]:
        """New questions.

        Args:
            count: how many.
            shares: relative frequency of each operation.

        Returns:
            The questions, in random order.
        """
        found: list[Question] = []
        names, weights = list(shares), list(shares.values())
        while len(found) < count:
            (operation,) = self._random.choices(names, weights)
            question = Question(operation, tuple(self._random.choices(range(NUMBERS), k=LENGTH)))
            if question not in self._asked:
                self._asked.add(question)
                found.append(question)
        return found


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write questions as training data, replacing the file at once.

    Args:
        path: a JSONL file with `prompt` and `completion` in each line.
        questions: what to write.
    """
    rows = (json.dumps({"prompt": question.prompt, "completion": question.completion}) for question in questions)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
