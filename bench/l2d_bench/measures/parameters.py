"""How many parameters a run trains."""

from __future__ import annotations

from typing import Literal

from l2d_bench.measures.base import Measure, Outcome, Subject, Value


class ParametersMeasure(Measure):
    """Trainable parameters of the run that made a model; nothing for a published model."""

    kind: Literal["parameters"] = "parameters"

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            The one.
        """
        return ["trainable"]

    def run(self, subject: Subject) -> Outcome:
        """Read them from the run's card.

        Args:
            subject: the model.

        Returns:
            The number, exact.
        """
        if subject.card is None:
            return Outcome()
        count = subject.card["parameters"]["trainable"]
        return Outcome(values={"trainable": Value(value=float(count), items=1)})
