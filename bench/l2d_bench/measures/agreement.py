"""Whether a model is the same on the CPU and on the GPU, and what bfloat16 changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from l2d_bench.measures.base import Measure, Outcome, Subject, Value
from l2d_framework.config.sections import UserPath
from l2d_framework.errors import L2DError

if TYPE_CHECKING:
    from l2d_bench.measures.devices import Reading
    from l2d_framework.models.unloaded import UnloadedModel


class AgreementMeasure(Measure):
    """Fails unless CPU and device agree in float32; also counts the tokens that bfloat16 changes.

    Every answer token of some rows is solved in sight of the true tokens before it, so that one that differs does not
    make all after it differ. `difference` is the largest difference of the log-probability of a true token between
    the devices in float32, in nats; `flips` the share of solved tokens that differ between them. `flips_bf16` is the
    share that differs between bfloat16 and float32 on the device, `flips_bf16_batch` between one row at a time and all
    rows at once in bfloat16. On a machine without a GPU both devices are the CPU.
    """

    kind: Literal["agreement"] = "agreement"
    data: UserPath
    """JSON lines with `prompt` and `completion`."""
    limit: int = Field(default=8, gt=1)
    max_length: int = Field(default=512, gt=1)
    """Longest row in tokens; the rest is cut off."""
    times: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75], min_length=1)
    """At which log-probabilities are compared; of a plain language model only 0 is."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Largest allowed `difference`, in nats."""
    allowed_flips: float = Field(default=0.005, ge=0, lt=1)
    """Largest allowed `flips`: rounding decides where two tokens are equally likely, or a draw falls between two."""

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            The four.
        """
        return ["difference", "flips", "flips_bf16", "flips_bf16_batch"]

    def run(self, subject: Subject) -> Outcome:
        """Compare.

        Args:
            subject: the model; its `dtype` is not used.

        Returns:
            The four values, the number of tokens and the devices.

        Raises:
            L2DError: if the devices do not agree.
        """
        from l2d_bench.measures.devices import difference, tokens

        source = _source(subject, "float32")
        reading = self._reading(source, subject)
        count = len(reading.rows)
        with _exact_products():
            host, device = (source.load(where) for where in ("cpu", subject.device))
            apart = difference(host, device, reading, count)
            ours, theirs = tokens(host, reading, count), tokens(device, reading, count)
            flips = float((ours != theirs).double().mean())
            if apart > self.tolerance or flips > self.allowed_flips:
                raise L2DError(
                    f"CPU and {subject.device} disagree in float32: log-probabilities by up to {apart:.2e} nats "
                    f"(allowed {self.tolerance:g}), {flips:.2%} of {len(ours)} tokens (allowed "
                    f"{self.allowed_flips:.2%}). Look for kernels of reduced precision, such as TF32."
                )
            del host, device
            half = _source(subject, "bfloat16").load(subject.device)
            together, alone = tokens(half, reading, count), tokens(half, reading, 1)
        shares = {
            "flips": ours != theirs,
            "flips_bf16": together != theirs,
            "flips_bf16_batch": together != alone,
        }
        values = {name: Value(value=float(s.double().mean()), items=len(s)) for name, s in shares.items()}
        return Outcome(
            values={"difference": Value(value=apart, items=len(ours) * len(reading.times)), **values},
            details={"devices": ["cpu", subject.device], "rows": count, "tokens": len(ours)},
        )

    def _reading(self, source: UnloadedModel, subject: Subject) -> Reading:
        from l2d_bench.measures.devices import Reading
        from l2d_framework.evaluation.diagnosis.batches import read_rows
        from l2d_framework.evaluation.harness.options import diffusing

        rows, _ = read_rows(source, [{"path": self.data, "limit": self.limit}], self.max_length)
        sampling = source.sampling(diffusing(subject.options) | {"seed": subject.seed})
        sampling = sampling.model_copy(update={"patience": None})
        return Reading(rows, sampling, self.times if sampling.num_inference_steps != 0 else [0.0])


def _source(subject: Subject, dtype: str) -> UnloadedModel:
    from l2d_framework.models.unloaded import UnloadedModel

    own = subject.options
    return UnloadedModel(subject.path, base=own.get("base"), dtype=dtype, revision=own.get("revision"))


@contextmanager
def _exact_products() -> Iterator[Any]:
    """No TF32, whatever this process was set to."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
