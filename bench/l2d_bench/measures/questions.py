"""Questions with one right answer, from a file."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from l2d_bench.measures.base import Measure, Outcome, Subject
from l2d_framework.config.sections import UserPath


class QuestionsMeasure(Measure):
    """Share of questions that a model answers as their completion does, white space at the ends aside."""

    kind: Literal["questions"] = "questions"
    data: UserPath
    """JSON lines with `prompt` and `completion`."""
    canvas: int = Field(ge=2)
    """Tokens of question and answer together."""
    limit: int | None = Field(default=None, gt=0)
    chat: bool = False
    """Ask in the model's chat template instead of as plain text."""
    answer: str | None = None
    """Pattern whose last match, without commas, is compared instead of the whole, such as a number."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the adapter below those of models and rows."""

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            The one.
        """
        return ["exact_match"]

    def run(self, subject: Subject) -> Outcome:
        """Ask and compare.

        Args:
            subject: the model.

        Returns:
            The share, with the score of each question; the first answers; mean evaluations per token.
        """
        from l2d_bench.data.rows import prompts_of, read_rows
        from l2d_bench.measures.prompts import Answerer, share

        rows = read_rows(self.data, ("prompt", "completion"), self.limit)
        found = Answerer(subject, self.options).ask(prompts_of(rows, chat=self.chat), self.canvas)
        scores = [
            float(self._answer(answer.text) == self._answer(row["completion"]) is not None)
            for row, answer in zip(rows, found, strict=True)
        ]
        return Outcome(
            values={"exact_match": share(scores)},
            texts=[
                {"prompt": row["prompt"], "text": answer.text} for row, answer in zip(rows[:5], found[:5], strict=True)
            ],
            details={"evaluations_per_token": sum(answer.evaluations for answer in found) / len(found)},
        )

    def _answer(self, text: str) -> str | None:
        if self.answer is None:
            return text.strip()
        matches = re.findall(self.answer, text)
        return matches[-1].replace(",", "") if matches else None
