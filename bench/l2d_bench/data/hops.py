"""Questions that take one look-up after another: where does the chain end that begins here?"""

from __future__ import annotations

import random
from pathlib import Path
from string import ascii_lowercase
from typing import Literal, Self

from pydantic import Field, model_validator

from l2d_bench.data.makers import Maker
from l2d_bench.data.rows import Row, write_rows


class HopQuestions(Maker):
    """Rows of chains of letters, each to the next and the last to itself: `, c a , a a , b c ; 2 from b = a`.

    Every hop looks up what the one before has found, so that no network of a fixed depth answers any number of them in
    one pass; who hops too often stays at the end. `base.jsonl` has single hops, several in every row, as texts;
    `new.jsonl` asks for the ends of chains, which are the answers after the most hops, as prompts with completions, and
    `held_out_N.jsonl` does where the end is N hops away, on other chains. Guessing one of the ends is right once in
    `chains`.
    """

    kind: Literal["hops"] = "hops"
    seed: int = 0
    chains: int = Field(default=3, gt=1)
    """Chains of a row, all of `most` + 1 letters."""
    most: int = Field(default=4, gt=1)
    """Largest number of hops to an end."""
    asked: int = Field(default=8, gt=0)
    """Single hops in a row of the base."""
    base_rows: int = Field(default=40_000, gt=0)
    new_questions: int = Field(default=40_000, gt=0)
    answers: int = Field(default=500, gt=0)
    """Held-out questions of each number of hops."""

    @model_validator(mode="after")
    def _has_letters(self) -> Self:
        places = self.chains * (self.most + 1)
        if places > len(ascii_lowercase):
            raise ValueError(f"chains {self.chains} of {self.most + 1} letters need {places} of 26; lower one")
        if self.asked > places:
            raise ValueError(f"asked {self.asked} exceeds the {places} letters of a row; lower it")
        return self

    def make(self, folder: Path) -> None:
        """Write the files.

        Args:
            folder: exists and is empty.
        """
        source = _Maps(self.seed, self.chains, self.most)
        write_rows(folder / "base.jsonl", [{"text": source.text(self.asked)} for _ in range(self.base_rows)])
        new = [source.question(1 + number % self.most) for number in range(self.new_questions)]
        write_rows(folder / "new.jsonl", new)
        for hops in range(1, self.most + 1):
            write_rows(folder / f"held_out_{hops}.jsonl", [source.question(hops) for _ in range(self.answers)])


class _Maps:
    """A source of chains that never shows the same twice."""

    def __init__(self, seed: int, chains: int, most: int) -> None:
        self._random, self._chains, self._length = random.Random(seed), chains, most + 1
        self._shown: set[str] = set()

    def _map(self) -> tuple[list[list[str]], str]:
        """Chains, from their beginnings to their ends, and their hops in random order."""
        while True:
            places = self._chains * self._length
            letters = self._random.sample(ascii_lowercase[:places], places)
            chains = [letters[start : start + self._length] for start in range(0, places, self._length)]
            pairs = _single_hops(chains)
            self._random.shuffle(pairs)
            text = "".join(f" , {a} {b}" for a, b in pairs) + " ;"
            if text not in self._shown:
                self._shown.add(text)
                return chains, text

    def text(self, asked: int) -> str:
        """Chains, and so many of their single hops in random order."""
        chains, text = self._map()
        return text + "".join(f" 1 from {a} = {b} ;" for a, b in self._random.sample(_single_hops(chains), asked))

    def question(self, hops: int) -> Row:
        """The end of a chain that is so many hops away, of other chains."""
        chains, text = self._map()
        chain = self._random.choice(chains)
        start = chain[self._length - 1 - hops]
        return {"prompt": f"{text} {self._length - 1} from {start} =", "completion": f" {chain[-1]}"}


def _single_hops(chains: list[list[str]]) -> list[tuple[str, str]]:
    return [hop for chain in chains for hop in zip(chain, [*chain[1:], chain[-1]], strict=True)]
