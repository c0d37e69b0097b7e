"""A text task made on the spot: one number computed from fifteen others, the computation named by a word or two."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from l2d_framework.writing import write_whole

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
_SHARE_OF_NEW = 0.04


@dataclass(frozen=True)
class Question:
    """An operation and what it is applied to; equal questions have equal answers."""

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
    """A source of questions that never asks the same one twice, so that what is drawn later is held out."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._asked: set[Question] = set()

    def draw(self, count: int, shares: dict[str, float]) -> list[Question]:
        """New questions in random order, their operations in the given proportions."""
        drawn: list[Question] = []
        names, weights = list(shares), list(shares.values())
        while len(drawn) < count:
            (operation,) = self._random.choices(names, weights)
            question = Question(operation, tuple(self._random.choices(range(NUMBERS), k=LENGTH)))
            if question not in self._asked:
                self._asked.add(question)
                drawn.append(question)
        return drawn


class Data(NamedTuple):
    """Questions that share none: `base` has all skills, the new one rarely, `new` that one only."""

    base: list[Question]
    new: list[Question]
    held_out_new: list[Question]
    held_out_old: list[Question]


def make_data(seed: int, *, base: int, new: int, answers: int) -> Data:
    """So many questions for training the base model and for finetuning, and `answers` held out of either kind."""
    source = Questions(seed)
    shares = {name: (1 - _SHARE_OF_NEW) / len(OLD) for name in OLD} | {NEW: _SHARE_OF_NEW}
    return Data(
        source.draw(base, shares),
        source.draw(new, {NEW: 1.0}),
        source.draw(answers, {NEW: 1.0}),
        [question for name in OLD for question in source.draw(answers // len(OLD), {name: 1.0})],
    )


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write questions as training data, JSON lines with `prompt` and `completion`."""
    rows = (json.dumps({"prompt": question.prompt, "completion": question.completion}) for question in questions)
    write_whole(path, "".join(f"{row}\n" for row in rows))
