"""Held-out tokens after each number of evaluations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from l2d_bench.measures.base import Measure, Outcome, Subject, Value
from l2d_framework.config.sections import UserPath


class StepsMeasure(Measure):
    """`l2d eval-steps`: `accuracy_N` and `nll_N` of held-out tokens after N evaluations, the true ones before given.

    `accuracy_0` and `nll_0` are those of the language model in it. Both are curves against evaluations with their
    standard errors, too; a plain language model's are flat.
    """

    kind: Literal["steps"] = "steps"
    data: UserPath
    """Rows of any format that training reads."""
    limit: int = Field(default=300, gt=0)
    max_length: int = Field(default=512, gt=1)
    """Longest row in tokens; the rest is cut off."""
    steps: list[int] = Field(default=[0, 1, 3, 7, 15], min_length=1)
    """Numbers of evaluations; those that the model's solver cannot make are left out."""

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            Two for each number of evaluations.
        """
        return [f"{name}_{count}" for count in self.steps for name in ("accuracy", "nll")]

    def run(self, subject: Subject) -> Outcome:
        """Measure.

        Args:
            subject: the model.

        Returns:
            Values, curves, and tokens per second of each number.
        """
        from l2d_framework.evaluation.diagnosis.batches import read_rows
        from l2d_framework.evaluation.diagnosis.steps import eval_steps, possible
        from l2d_framework.evaluation.harness.options import diffusing
        from l2d_framework.models.unloaded import UnloadedModel

        chosen = subject.options
        dtype = None if subject.dtype == "auto" else subject.dtype
        source = UnloadedModel(subject.path, base=chosen.get("base"), dtype=dtype, revision=chosen.get("revision"))
        options = diffusing(chosen) | {"seed": subject.seed}
        plain = options.pop("num_inference_steps", None) == 0
        settings = possible(source, [options], [0] if plain else self.steps)
        rows, _ = read_rows(source, [{"path": self.data, "limit": self.limit}], self.max_length)
        size = 16 if subject.batch_size == "auto" else int(subject.batch_size)
        found = eval_steps(source.load(subject.device), rows, settings, batch_size=size)
        curves: dict[str, list[list[float]]] = {"accuracy": [], "nll": []}
        values, speeds = {}, {}
        for entry in found["settings"]:
            own = entry["num_inference_steps"]
            speeds[str(own)] = found["tokens"] / entry["seconds"]
            for name, points in curves.items():
                number = entry[name]
                error = number["standard_error"]
                value = Value(value=number["value"], error=error, items=found["rows"])
                for count in self.steps if plain else [own]:
                    values[f"{name}_{count}"] = value
                    points.append([count, number["value"]] + [error] * (error is not None))
        return Outcome(values=values, curves=curves, details={"tokens": found["tokens"], "tokens_per_second": speeds})
