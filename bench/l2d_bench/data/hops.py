"""Questions that take one look-up after another: where does one arrive after so many hops?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from l2d_bench.data.makers import Maker
from l2d_bench.data.rows import Row, write_rows


class HopQuestions(Maker):
    """Rows of a map of numbers, each to another, and hops along it: `, 3 5 , 5 0 , 0 3 ; 2 from 3 = 0`.

    Every hop looks up what the one before has found, so that no network of a fixed depth answers any number of them in
    one pass. `base.jsonl` has all hops of one in every row, as texts; `new.jsonl` questions of one hop up to the most,
    as prompts with completions, and `held_out_N.jsonl` those of N hops, of other maps.
    """

    kind: Literal["hops"] = "hops"
    seed: int = 0
    places: int = Field(default=8, gt=1)
    """Numbers of a map."""
    most: int = Field(default=4, gt=1)
    """Largest number of hops of a question."""
    base_rows: int = Field(default=40_000, gt=0)
    new_questions: int = Field(default=40_000, gt=0)
    answers: int = Field(default=500, gt=0)
    """Held-out questions of each number of hops."""

    def make(self, folder: Path) -> None:
        """Write the files.

        Args:
            folder: exists and is empty.
        """
        source = _Maps(self.seed, self.places)
        base = (source.text() for _ in range(self.base_rows))
        write_rows(folder / "base.jsonl", [{"text": text} for text in base])
        new = [source.question(1 + number % self.most) for number in range(self.new_questions)]
        write_rows(folder / "new.jsonl", new)
        for hops in range(1, self.most + 1):
            write_rows(folder / f"held_out_{hops}.jsonl", [source.question(hops) for _ in range(self.answers)])


class _Maps:
    """A source of maps that never shows one twice."""

    def __init__(self, seed: int, places: int) -> None:
        self._random, self._places = random.Random(seed), places
        self._shown: set[str] = set()

    def _map(self) -> tuple[list[int], str]:
        """A cycle through all places, so that no hop leads back early, and its text in random order."""
        while True:
            cycle = self._random.sample(range(self._places), self._places)
            pairs = [(place, cycle[(i + 1) % self._places]) for i, place in enumerate(cycle)]
            self._random.shuffle(pairs)
            text = "".join(f" , {a} {b}" for a, b in pairs) + " ;"
            if text not in self._shown:
                self._shown.add(text)
                return [to for _, to in sorted(pairs)], text

    def text(self) -> str:
        """A map, and all hops of one in random order."""
        to, text = self._map()
        starts: Iterator[int] = iter(self._random.sample(range(self._places), self._places))
        return text + "".join(f" 1 from {start} = {to[start]} ;" for start in starts)

    def question(self, hops: int) -> Row:
        """A question of another map."""
        to, text = self._map()
        here = start = self._random.randrange(self._places)
        for _ in range(hops):
            here = to[here]
        return {"prompt": f"{text} {hops} from {start} =", "completion": f" {here}"}
