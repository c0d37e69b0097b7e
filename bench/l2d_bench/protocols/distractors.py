"""Held-out questions of the TESS 2 tables with wrong answers beside the right one, for models not tuned to answer."""

from __future__ import annotations

import random
from functools import cache
from typing import TYPE_CHECKING, Any

from l2d_bench.data.rows import Row
from l2d_bench.data.tess_data import TessTexts

if TYPE_CHECKING:
    import datasets

_WRONG, _LARGEST = 3, 31


def task_data(questions: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """What the task files `bench/tasks/tiny/tiny_*_choice.yaml` ask.

    Args:
        questions: `numbers` or `sorting`.
        **metadata: further metadata of the task.

    Returns:
        A split `test` with `prompt`, four `choices` and the place of the right one, `answer`.
    """
    import datasets

    return {"test": datasets.Dataset.from_list([with_choices(row) for row in _splits()[questions].held_out])}


def with_choices(row: Row) -> dict[str, Any]:
    """A question with answers to choose from: other numbers of the question, or its numbers in a wrong order.

    Args:
        row: `prompt` and `completion`.

    Returns:
        `prompt`, `choices` in random order, the same each time, and `answer`.
    """
    prompt, right = str(row["prompt"]), str(row["completion"])
    chance, found = random.Random(prompt), {right}
    while len(found) <= _WRONG:
        found.add(_wrong(prompt.split()[1:-1], right.split(), chance))
    choices = sorted(found)
    chance.shuffle(choices)
    return {"prompt": prompt, "choices": choices, "answer": choices.index(right)}


def _wrong(numbers: list[str], right: list[str], chance: random.Random) -> str:
    if len(right) == 1:
        # A question may repeat one number nine times, so any other number may be drawn, too.
        return f" {chance.choice([*numbers, str(chance.randint(0, _LARGEST))])}"
    first, second = chance.sample(range(len(right)), 2)
    right[first], right[second] = right[second], right[first]
    return f" {' '.join(right)}"


@cache
def _splits() -> Any:
    return TessTexts().splits()
