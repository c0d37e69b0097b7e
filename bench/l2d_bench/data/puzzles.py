"""Questions that take one small step after another: a carry through many places, a cell of a sudoku."""

from __future__ import annotations

import random
from abc import abstractmethod
from functools import cache
from itertools import count
from pathlib import Path
from typing import Literal

from pydantic import Field
from typing_extensions import override

from l2d_bench.data.makers import Maker
from l2d_bench.data.rows import write_rows


class Puzzles(Maker):
    """Questions of one token's answer, which so many steps lead to.

    `base.jsonl` has those of one step as texts; `new.jsonl` those of 1 to `most` steps as prompts with completions, and
    `held_out_N.jsonl` others of N steps. No question is there twice.
    """

    seed: int = 0
    most: int = Field(default=4, gt=1, le=6)
    """Largest number of steps."""
    base_rows: int = Field(default=40_000, gt=0)
    new_questions: int = Field(default=40_000, gt=0)
    answers: int = Field(default=500, gt=0)
    """Held-out questions of each number of steps."""

    def make(self, folder: Path) -> None:
        """Write the files.

        Args:
            folder: exists and is empty.
        """
        source, shown = random.Random(self.seed), set()

        def row(steps: int) -> tuple[str, str]:
            while True:
                prompt, answer = self.question(source, steps)
                if prompt not in shown:
                    shown.add(prompt)
                    return f"{prompt} =", f" {answer}"

        # Held-out ones first: of few steps there are not many.
        for steps in range(1, self.most + 1):
            asked = (row(steps) for _ in range(self.answers))
            write_rows(folder / f"held_out_{steps}.jsonl", [{"prompt": p, "completion": a} for p, a in asked])
        write_rows(folder / "base.jsonl", [{"text": "".join(row(1))} for _ in range(self.base_rows)])
        new = (row(1 + number % self.most) for number in range(self.new_questions))
        write_rows(folder / "new.jsonl", [{"prompt": p, "completion": a} for p, a in new])

    @abstractmethod
    def question(self, source: random.Random, steps: int) -> tuple[str, int]:
        """Draw a question, which may be one that was there.

        Args:
            source: of random numbers.
            steps: how many lead to the answer.

        Returns:
            The question and the answer.
        """


class Carries(Puzzles):
    """The first digit of a sum written in columns, ` 3 1 , 4 5 , 7 2 , 1 9`, which a carry reaches or not.

    A column of 9 passes on what comes from its right, so that `steps` columns decide; who does not look is right in
    half of them.
    """

    kind: Literal["carries"] = "carries"

    @override
    def question(self, source: random.Random, steps: int) -> tuple[str, int]:
        carry = source.random() < 0.5
        pairs = [(a, b) for a in range(10) for b in range(10)]
        first = source.choice([(a, b) for a, b in pairs if 0 < a + b < 9])
        nines = source.choices([(a, b) for a, b in pairs if a + b == 9], k=steps - 1)
        decides = source.choice([(a, b) for a, b in pairs if (a + b > 9 if carry else a + b < 9)])
        rest = source.choices(pairs, k=self.most - steps)
        columns = [first, *nines, decides, *rest]
        return " ,".join(f" {a} {b}" for a, b in columns), sum(first) + carry


class Sudoku(Puzzles):
    """A cell of a sudoku of 4 x 4, ` 1 . . 4 / . ? 1 . / ...`, that is known after `steps` rounds.

    In a round every cell is filled in whose row, column and square leave it one digit.
    """

    kind: Literal["sudoku"] = "sudoku"
    most: int = Field(default=3, gt=1, le=4)

    @override
    def question(self, source: random.Random, steps: int) -> tuple[str, int]:
        while True:
            solved = source.choice(_solved())
            given = {cell: solved[cell] for cell in source.sample(range(16), source.randint(4, 8))}
            known = [cell for cell, after in rounds(given).items() if after == steps]
            if known:
                asked = source.choice(known)
                signs = [str(given.get(cell, "?" if cell == asked else ".")) for cell in range(16)]
                rows = ("".join(f" {sign}" for sign in signs[start : start + 4]) for start in range(0, 16, 4))
                return " /".join(rows), solved[asked]


_HOUSES = [
    *([4 * row + column for column in range(4)] for row in range(4)),
    *([4 * row + column for row in range(4)] for column in range(4)),
    *([8 * top + 2 * left + corner for corner in (0, 1, 4, 5)] for top in range(2) for left in range(2)),
]
_SEEN = [{other for house in _HOUSES if cell in house for other in house} - {cell} for cell in range(16)]


@cache
def _solved() -> list[tuple[int, ...]]:
    """The 288 filled grids."""
    grids: list[tuple[int, ...]] = [()]
    for cell in range(16):
        grids = [(*g, d) for g in grids for d in (1, 2, 3, 4) if all(g[o] != d for o in _SEEN[cell] if o < cell)]
    return grids


def rounds(given: dict[int, int]) -> dict[int, int]:
    """After how many rounds each cell is known that is not given; cells that never are, are left out.

    Args:
        given: digits by cell, 0 to 15.

    Returns:
        Rounds by cell.
    """
    filled, found = dict(given), dict[int, int]()
    for number in count(1):
        left = {cell: {1, 2, 3, 4} - {filled.get(o) for o in _SEEN[cell]} for cell in range(16) if cell not in filled}
        new = {cell: digits.pop() for cell, digits in left.items() if len(digits) == 1}
        if not new:
            break
        filled |= new
        found |= dict.fromkeys(new, number)
    return found
