"""What a model costs: tokens per second and memory, of its training and of its answers."""

from __future__ import annotations

from statistics import median
from typing import Any, Literal

from pydantic import Field

from l2d_bench.measures.base import Measure, Outcome, Subject, Value
from l2d_framework.config.sections import UserPath

_GIBIBYTE = 2**30


class CostMeasure(Measure):
    """Tokens per second and peak memory: `training` and `training_memory`, `writing` and `writing_memory`.

    Of training they are what the run noted, and missing where a model was not trained here; memory is allocated memory
    on a GPU, resident memory elsewhere, in GiB. Answers to a few prompts are written together, as many tokens for each
    whatever ends one, several times over after a first that is not counted: `writing` is the median, and
    `writing_memory` is measured on a GPU only, since a process does not forget what it once held.
    """

    kind: Literal["cost"] = "cost"
    data: UserPath
    """JSON lines with `prompt`."""
    limit: int = Field(default=16, gt=0)
    """Prompts, answered together."""
    chat: bool = False
    """Ask in the model's chat template instead of as plain text."""
    new_tokens: int = Field(default=64, ge=1)
    """Of each answer."""
    rounds: int = Field(default=5, ge=1)
    """How often all is answered."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the adapter below those of models and rows."""

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            The four.
        """
        return ["training", "training_memory", "writing", "writing_memory"]

    def run(self, subject: Subject) -> Outcome:
        """Read the run's card, and answer.

        Args:
            subject: the model.

        Returns:
            The values there are, and the tokens per second of each round.
        """
        from l2d_bench.data.rows import prompts_of, read_rows
        from l2d_bench.measures.prompts import Answerer

        values = {}
        if subject.card is not None:
            result = subject.card["result"]
            values["training"] = _one(result["tokens_per_second"])
            values["training_memory"] = _one(result["peak_memory"] / _GIBIBYTE)
        prompts = prompts_of(read_rows(self.data, ("prompt",), self.limit), chat=self.chat)
        speeds, memory = Answerer(subject, self.options).timed(prompts, self.new_tokens, self.rounds)
        values["writing"] = Value(value=median(speeds), items=len(speeds))
        if memory:
            values["writing_memory"] = _one(memory / _GIBIBYTE)
        absent = [name for name in self.metrics() if name not in values]
        return Outcome(values=values, absent=absent, details={"tokens_per_second": speeds})


def _one(value: float) -> Value:
    return Value(value=float(value), items=1)
