"""Whether a network knows more than its own first prediction and the hint in its noisy state."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from l2d_bench.measures.base import Measure, Outcome, Subject, Value
from l2d_framework.config.sections import UserPath


class DiagnosisMeasure(Measure):
    """`l2d diagnose`: of each time T, `network_T`, `combination_T` and what the network gains, `gain_T`, in nats.

    The combination is of the network's own prediction from noise alone with the exact likelihood of the noisy state, by
    Bayes' rule. What a network is shown of an evaluation before is that at the time before, 0 the first. Nothing for a
    plain language model.
    """

    kind: Literal["diagnosis"] = "diagnosis"
    data: UserPath
    """Rows of any format that training reads."""
    limit: int = Field(default=300, gt=0)
    max_length: int = Field(default=512, gt=1)
    """Longest row in tokens; the rest is cut off."""
    times: list[float] = Field(default=[0.5, 0.9, 0.97], min_length=1)
    """Increasing, above 0 and below 1."""

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            Three for each time.
        """
        return [f"{name}_{time:g}" for time in self.times for name in ("network", "combination", "gain")]

    def run(self, subject: Subject) -> Outcome:
        """Measure.

        Args:
            subject: the model.

        Returns:
            The values.
        """
        import torch

        from l2d_framework.evaluation.diagnosis.batches import batches, read_rows
        from l2d_framework.evaluation.diagnosis.curves import TokenLikelihood, cross_entropies
        from l2d_framework.evaluation.statistics import ratio
        from l2d_framework.models.unloaded import UnloadedModel

        chosen = subject.options
        dtype = None if subject.dtype == "auto" else subject.dtype
        source = UnloadedModel(subject.path, base=chosen.get("base"), dtype=dtype, revision=chosen.get("revision"))
        if source.is_plain:
            return Outcome()
        rows, _ = read_rows(source, [{"path": self.data, "limit": self.limit}], self.max_length)
        model = source.load(subject.device)
        likelihood, times = TokenLikelihood(model), [0.0, *self.times]
        size = 16 if subject.batch_size == "auto" else int(subject.batch_size)
        counts, network, combined = [], [], []
        for batch in batches(model, rows, seed=subject.seed, size=size):
            with torch.no_grad():
                context = model.backbone.read(batch.layout)
            found = cross_entropies(model, batch, context=context, times=times, likelihood=likelihood)
            counts.append(batch.valid.sum(1).cpu())
            network.append(found.network)
            combined.append(found.combined[:, 0])
        tokens = torch.cat(counts)
        sums = {"network": torch.cat(network), "combination": torch.cat(combined)}
        sums["gain"] = sums["combination"] - sums["network"]
        values = {}
        for name, each in sums.items():
            numbers = [ratio(each[:, place], tokens) for place in range(len(times))]
            for time, number in zip(times[1:], numbers[1:], strict=True):
                value, error = float(number.value or 0), number.standard_error
                values[f"{name}_{time:g}"] = Value(value=value, error=error, items=len(rows))
        return Outcome(values=values, details={"tokens": int(tokens.sum())})
