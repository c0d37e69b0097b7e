"""Losses along a training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from l2d_bench.measures.base import Measure, Outcome, Subject, Value

_NAMES = ("loss", "loss_without_pads", "eval_loss", "eval_loss_without_pads")


class LossMeasure(Measure):
    """What a run of this profile logged; nothing for a published model.

    `last` is the mean training loss over the last tenth of the logged updates, `held_out` the last evaluation's, and
    `accuracy` the share of held-out pairs that a reward model ranks right.
    """

    kind: Literal["loss"] = "loss"

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            The names.
        """
        return ["last", "held_out", "accuracy"]

    def run(self, subject: Subject) -> Outcome:
        """Read the log beside the model.

        Args:
            subject: the model.

        Returns:
            The curves, in nats per token against updates, and the values that are known.
        """
        path = Path(subject.path) / "trainer_state.json"
        if subject.card is None or not path.is_file():
            return Outcome()
        log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        curves = {name: [[float(e["step"]), float(e[name])] for e in log if name in e] for name in _NAMES}
        # Packed texts have padding in their last row only, so that the loss without it is logged once or never.
        least = {"loss_without_pads": 2}
        curves = {name: points for name, points in curves.items() if len(points) >= least.get(name, 1)}
        values = {}
        if "loss" in curves:
            last = [loss for _, loss in curves["loss"]][-max(1, len(curves["loss"]) // 10) :]
            values["last"] = Value(value=sum(last) / len(last), items=len(last))
        if "eval_loss" in curves:
            values["held_out"] = Value(value=curves["eval_loss"][-1][1], items=1)
        if "accuracy" in (ranked := subject.card["result"].get("held_out") or {}):
            values["accuracy"] = Value(value=ranked["accuracy"], items=1)
        return Outcome(values=values, curves=curves)
