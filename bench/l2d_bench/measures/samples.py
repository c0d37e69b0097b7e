"""Answers to read side by side."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from l2d_bench.measures.base import Measure, Outcome, Subject
from l2d_framework.config.sections import UserPath


class SamplesMeasure(Measure):
    """Answers to the first prompts of a file, shown and not judged; `words` is their mean length."""

    kind: Literal["samples"] = "samples"
    data: UserPath
    """JSON lines with `prompt`."""
    canvas: int = Field(ge=2)
    """Tokens of prompt and answer together."""
    limit: int = Field(default=4, gt=0)
    chat: bool = True
    """Ask in the model's chat template instead of as plain text."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the adapter below those of models and rows."""

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            The one.
        """
        return ["words"]

    def run(self, subject: Subject) -> Outcome:
        """Let the model answer.

        Args:
            subject: the model.

        Returns:
            The answers.
        """
        from l2d_bench.data.rows import prompts_of, read_rows
        from l2d_bench.measures.prompts import Answerer, share

        rows = read_rows(self.data, ("prompt",), self.limit)
        found = Answerer(subject, self.options).ask(prompts_of(rows, chat=self.chat), self.canvas)
        return Outcome(
            values={"words": share([float(len(answer.text.split())) for answer in found])},
            texts=[{"prompt": row["prompt"], "text": answer.text} for row, answer in zip(rows, found, strict=True)],
        )
