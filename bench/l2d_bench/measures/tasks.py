"""Tasks of lm_eval as measures."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from l2d_bench import folder as bench_folder
from l2d_bench.files import code_of
from l2d_bench.measures.base import Measure, Outcome, Subject, Value
from l2d_framework.errors import PluginError, install


class TaskMeasure(Measure):
    """One task, or group of tasks, of lm_eval, answered through the adapter."""

    kind: Literal["task"] = "task"
    task: str
    """A task of lm_eval or of `bench/tasks`, or a task file with the name of its task, such as `mine/sums.yaml`."""
    limit: int | None = Field(default=None, gt=0)
    """First items of each task; all when None."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; the task's own number when None."""
    chat: Literal["none", "template", "multiturn"] = "none"
    """No chat template; the model's, where it has one; that with each example as a turn of the past conversation."""
    generation: dict[str, Any] = Field(default_factory=dict)
    """Generation options as in `--gen_kwargs`."""
    runs_code: bool = False
    """Whether the task runs code that models write, as HumanEval does; who runs the benchmark has to agree."""
    batch_size: int | Literal["auto"] | None = None
    """The profile's when None."""

    def _place(self) -> tuple[str, Path]:
        """Name of the task and folder with its file."""
        path = Path(self.task)
        return (path.stem, path.parent) if path.suffix == ".yaml" else (self.task, bench_folder() / "tasks")

    def check(self) -> str | None:
        """Look for lm_eval, the task and its data.

        Returns:
            Which data sets are missing, and which folders would serve, or whose consent; None if nothing is.

        Raises:
            ConfigError: if there is no such task.
            PluginError: if lm_eval is not installed.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise PluginError(f"Benchmarks need lm_eval. Run: {install('l2d-framework[eval]')}")
        from l2d_framework.evaluation.code.sandbox import CONSENT
        from l2d_framework.evaluation.harness.run import check_task

        if self.runs_code and os.environ.get(CONSENT) != "1":
            return "programs that models write run only with --confirm-run-unsafe-code"
        missing = check_task(*self._place())
        if not missing:
            return None
        return f"{', '.join(missing)} cannot be reached; folders of that name in the working directory would serve"

    def identity(self) -> dict[str, Any]:
        """What tells this measure from others.

        Returns:
            Its fields without the batch size, and fingerprints of the task and of the code that scores it.
        """
        from l2d_framework.evaluation.harness.run import task_identity

        found = self.model_dump(mode="json", exclude={"batch_size"})
        return found | {
            "fingerprint": task_identity(*self._place()),
            "protocols": code_of("l2d_bench.protocols"),
            "lm_eval": version("lm_eval"),
        }

    def run(self, subject: Subject) -> Outcome:
        """Answer the task.

        Args:
            subject: the model.

        Returns:
            The task's metrics as `metric,filter`, with scores per item.

        Raises:
            ConfigError: if the model cannot be evaluated so.
        """
        from l2d_framework.evaluation.harness.run import ModelChoice, TaskChoice, evaluate

        options = {"dtype": subject.dtype} | subject.options | {"seed": subject.seed}
        name, folder = self._place()
        asked = TaskChoice(name, self.limit, self.num_fewshot, self.chat, self.generation, self.runs_code)
        batch_size = self.batch_size or subject.batch_size
        model = ModelChoice(subject.path, options, device=subject.device, batch_size=batch_size)
        found = evaluate(model, asked, folder=folder)
        return Outcome(
            values={name: Value(**numbers) for name, numbers in found.values.items()}, details=_facts(found.details)
        )


def _facts(details: dict[str, Any]) -> dict[str, Any]:
    """The adapter's account, what figures draw of it at the top."""
    costs = [cost for cost in details["l2d"]["cost"].values() if cost["evaluations_per_token_mean"] is not None]
    return details | {
        "evaluations_per_token": costs[0]["evaluations_per_token_mean"] if costs else None,
        "tokens_per_second": costs[0]["tokens_per_second"] if costs else None,
    }
