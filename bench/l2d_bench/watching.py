"""Progress of a training run for whoever started the job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Watcher(TrainerCallback):
    """Reports every update of a run.

    Args:
        report: told the updates made, those to make, and the loss.
    """

    def __init__(self, report: Callable[[int, int, str], None]) -> None:
        self._report, self._loss = report, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102 -- transformers'
        self._report(state.global_step, state.max_steps, self._loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: D102
        if "loss" in (logs or {}):
            self._loss = f"loss {logs['loss']:.3f}"
