"""Preference pairs from a model of the profile."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

from pydantic import Field

from l2d_bench.data.makers import Maker
from l2d_bench.data.row_files import FILE
from l2d_bench.data.rows import prompts_of, read_rows, write_rows
from l2d_framework.config.sections import UserPath

_REPLACED = 0.3
"""Share of words that `replace` exchanges."""


class AnswerPairs(Maker):
    """True answers against those of a model in one half, against corrupted ones in the other, as `rows.jsonl`.

    Each row has `prompt`, `chosen` and `rejected`. Two reward models that share no prompt take the `first` and the
    `second` half of the questions.
    """

    kind: Literal["answer_pairs"] = "answer_pairs"
    model: UserPath
    """Folder of the model that answers."""
    data: UserPath
    """JSON lines with `prompt` and `completion`."""
    half: Literal["first", "second"]
    corrupt: Literal["replace", "shuffle"]
    """Put words of other answers in the place of some, or change the order of words."""
    canvas: int = Field(ge=2)
    """Tokens of question and answer together."""
    num_inference_steps: int = Field(default=8, gt=0)
    seed: int = 0
    limit: int | None = Field(default=None, gt=0)
    """Of questions, before they are halved."""

    def make(self, folder: Path) -> None:
        """Let the model answer, and write the pairs.

        Args:
            folder: exists and is empty.
        """
        from l2d_bench.measures.base import Subject
        from l2d_bench.measures.prompts import Answerer

        rows = read_rows(self.data, ("prompt", "completion"), self.limit)
        middle = len(rows) // 2
        rows = rows[:middle] if self.half == "first" else rows[middle:]
        asked = rows[: len(rows) // 2]
        options = {"num_inference_steps": self.num_inference_steps}
        answerer = Answerer(Subject(self.model, options, self.seed, dtype="float32", batch_size=40), {})
        rejected = [answer.text for answer in answerer.ask(prompts_of(asked, chat=True), self.canvas)]
        chance = random.Random(self.seed)
        words = [word for row in rows for word in row["completion"].split(" ")]
        for row in rows[len(asked) :]:
            own = row["completion"].split(" ")
            if self.corrupt == "shuffle":
                chance.shuffle(own)
            else:
                own = [chance.choice(words) if chance.random() < _REPLACED else word for word in own]
            rejected.append(" ".join(own))
        pairs = zip(rows, rejected, strict=True)
        write_rows(
            folder / FILE,
            ({"prompt": row["prompt"], "chosen": row["completion"], "rejected": bad} for row, bad in pairs),
        )
