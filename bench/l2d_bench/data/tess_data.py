"""Data of the tiny TESS 2 tables: questions about numbers, and sentences that follow each other."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from l2d_bench.data.makers import Maker, missing_data
from l2d_bench.data.rows import Row, write_rows

_LARGEST, _COUNT, _SORTED = 31, 9, 6
_OPERATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "largest": max,
    "smallest": min,
    "second largest": lambda numbers: sorted(numbers)[-2],
    "median": lambda numbers: sorted(numbers)[len(numbers) // 2],
}
_EQUATION = re.compile(r"<<(\d+[-+*/]\d+)=(\d+)>>")
_MARKS = re.compile(r"<<.*?>>")
_SENTENCES = re.compile(r"(?<=[.?!])\s+")
_REPEATED = 2
_CORRUPTED = 0.5
_Corrupt = Callable[[str, Sequence[str], random.Random], str]


class Split(NamedTuple):
    """Rows of one kind; none stands in two parts.

    Attributes:
        train: to train on.
        trial: to try settings on; no result of TESS 2 uses them.
        held_out: to measure with.
    """

    train: list[Row]
    trial: list[Row]
    held_out: list[Row]


class TessTexts(Maker):
    """What the tiny models of the TESS 2 tables learn from and are measured with.

    Questions of three kinds: `numbers` asks for one computed from nine, `sorting` for six in order, `equations` for
    the value of an expression in the solutions of GSM8K; expressions held out occur in no training solution.
    `stories` are a sentence of GSM8K and the one that follows it. Needs the data sets `openai/gsm8k` and
    `implicit_cot/gsm8k_equations`.

    Writes `corpus.jsonl` (`text`), `tune.jsonl`, `trial_KIND.jsonl` and `held_out_KIND.jsonl` (`prompt`, `completion`),
    `documents.jsonl` (`text`, questions of GSM8K's test split) and, for two reward models that share no prompt,
    `preferences.jsonl` and `preferences_held_out.jsonl` (`prompt`, `chosen`, `rejected`): true continuations against
    such with jumbled letters, or with words made of the parts of two.
    """

    kind: Literal["tess_texts"] = "tess_texts"
    seed: int = 0
    questions: int = Field(default=16_000, gt=0)
    """Training questions of each kind that is made up."""
    held_out: int = Field(default=500, gt=0)
    """Held-out questions of each kind; as many again are for trials."""
    longest: int = Field(default=68, gt=0)
    """Characters of the two sentences of a story together."""

    def missing(self) -> str | None:
        """Look for the data sets.

        Returns:
            What is missing; None if both are there.
        """
        return missing_data("openai/gsm8k", "implicit_cot/gsm8k_equations")

    def make(self, folder: Path) -> None:
        """Write the files.

        Args:
            folder: exists and is empty.
        """
        splits = self.splits()
        for kind, split in splits.items():
            write_rows(folder / f"trial_{kind}.jsonl", split.trial)
            write_rows(folder / f"held_out_{kind}.jsonl", split.held_out)
        tune = self.tuning(splits)
        write_rows(folder / "tune.jsonl", tune)
        write_rows(folder / "corpus.jsonl", [{"text": text} for text in self.corpus(tune)])
        questions = [str(row["question"]) for row in _rows("openai/gsm8k", "main", "test")]
        write_rows(folder / "documents.jsonl", [{"text": text} for text in questions])
        stories = splits["stories"].train
        half = len(stories) // 2
        write_rows(folder / "preferences.jsonl", _preferences(stories[:half], _jumbled, self.seed))
        write_rows(folder / "preferences_held_out.jsonl", _preferences(stories[half:], _spliced, self.seed))

    def splits(self) -> dict[str, Split]:
        """All rows by kind.

        Returns:
            `numbers`, `sorting`, `equations` and `stories`.
        """
        return {
            "numbers": self._drawn("numbers", _one_of_nine),
            "sorting": self._drawn("sorting", _in_order),
            "equations": self.equations(),
            "stories": self._stories(),
        }

    def tuning(self, splits: dict[str, Split]) -> list[Row]:
        """Training rows of all kinds in random order; the few stories come twice.

        Args:
            splits: what `splits` returned.

        Returns:
            Rows with `prompt` and `completion`.
        """
        rows = [row for kind in ("numbers", "sorting", "equations") for row in splits[kind].train]
        rows += splits["stories"].train * _REPEATED
        random.Random(self.seed).shuffle(rows)
        return rows

    def corpus(self, tuning: Sequence[Row]) -> list[str]:
        """Texts for pretraining and adaptation: GSM8K's training split, and questions with their answers as plain text.

        Args:
            tuning: what `tuning` returned.

        Returns:
            The texts in random order.
        """
        texts = [row["prompt"] + row["completion"] for row in tuning]
        for row in _rows("openai/gsm8k", "main", "train"):
            texts += [str(row["question"]), _MARKS.sub("", str(row["answer"]))]
        random.Random(self.seed).shuffle(texts)
        return texts

    def _drawn(self, kind: str, draw: Callable[[random.Random], tuple[str, str]]) -> Split:
        chance, found = random.Random(f"{kind} {self.seed}"), dict[str, str]()
        while len(found) < self.questions + 2 * self.held_out:
            found.update([draw(chance)])
        return self._split(_pairs(list(found.items())))

    def equations(self) -> Split:
        """Expressions in solutions of GSM8K and their values; those of training solutions come as often as there.

        Returns:
            The rows.
        """
        seen: list[tuple[str, str]] = []
        new: list[tuple[str, str]] = []
        for split in ("train", "validation", "test"):
            for row in _rows("implicit_cot/gsm8k_equations", None, split):
                (seen if split == "train" else new).extend(_EQUATION.findall(str(row["cot"])))
        apart = sorted(set(new) - set(seen))
        random.Random(self.seed).shuffle(apart)
        trained, rest = (
            _pairs([(" ".join(expression) + " =", " " + " ".join(value)) for expression, value in equations])
            for equations in (seen, apart)
        )
        held_out = rest[: self.held_out]
        return Split(trained, rest[self.held_out : 2 * self.held_out], held_out)

    def _stories(self) -> Split:
        train, test = (self._neighbours(split) for split in ("train", "test"))
        random.Random(self.seed).shuffle(train)
        return Split(train[100:], train[:100], test)

    def _neighbours(self, split: str) -> list[Row]:
        found = dict[str, str]()
        for row in _rows("openai/gsm8k", "main", split):
            for text in (str(row["question"]), _MARKS.sub("", str(row["answer"]).split("####")[0])):
                sentences = _SENTENCES.split(text.strip())
                for first, second in pairwise(sentences):
                    if len(first) + len(second) <= self.longest:
                        found.setdefault(first, " " + second)
        return _pairs(list(found.items()))

    def _split(self, rows: list[Row]) -> Split:
        n = self.held_out
        return Split(rows[2 * n :], rows[n : 2 * n], rows[:n])


def _one_of_nine(chance: random.Random) -> tuple[str, str]:
    operation = chance.choice(list(_OPERATIONS))
    numbers = [chance.randint(0, _LARGEST) for _ in range(_COUNT)]
    return f"{operation} {_spaced(numbers)} =", f" {_OPERATIONS[operation](numbers)}"


def _in_order(chance: random.Random) -> tuple[str, str]:
    numbers = [chance.randint(0, _LARGEST) for _ in range(_SORTED)]
    return f"sorted {_spaced(numbers)} =", f" {_spaced(sorted(numbers))}"


def _spaced(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _pairs(pairs: Sequence[tuple[str, str]]) -> list[Row]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def _rows(path: str, name: str | None, split: str) -> Any:
    from l2d_framework.config.sections import RowSource
    from l2d_framework.training.data.sources import load_rows

    return load_rows(RowSource(path=path, name=name, split=split))[0]


def _preferences(stories: Sequence[Row], corrupt: _Corrupt, seed: int) -> list[Row]:
    chance = random.Random(seed)
    words = [word for row in stories for word in row["completion"].split()]
    found = []
    for row in [*stories] * _REPEATED:
        own = row["completion"].split()
        rejected = " " + " ".join(
            corrupt(word, words, chance) if chance.random() < _CORRUPTED else word for word in own
        )
        if rejected != row["completion"]:
            found.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return found


def _jumbled(word: str, words: Sequence[str], chance: random.Random) -> str:
    return "".join(chance.sample(word, len(word)))


def _spliced(word: str, words: Sequence[str], chance: random.Random) -> str:
    first, second = chance.choice(words), chance.choice(words)
    return first[: (len(first) + 1) // 2] + second[len(second) // 2 :]
