"""Tasks of lm_eval as measures."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from l2d_framework.benchmark.measure import Measure, Outcome, Subject, Value


class TaskMeasure(Measure):
    """One task, or group of tasks, of lm_eval, answered through the adapter."""

    kind: Literal["task"] = "task"
    task: str
    """A task of lm_eval or of `bench/tasks`."""
    limit: int | None = Field(default=None, gt=0)
    """First items of each task; all when None."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; the task's own number when None."""
    chat: Literal["none", "template", "multiturn"] = "none"
    """No chat template; the model's chat template; that with each example as a turn of the past conversation."""
    generation: dict[str, Any] = Field(default_factory=dict)
    """Generation options as in `--gen_kwargs`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the adapter for this task, such as `class_name` of its guidance; a row's win."""
    runs_code: bool = False
    """Consent to run the code that models write, which tasks such as HumanEval need."""
    batch_size: int | Literal["auto"] | None = None
    """The profile's when None."""

    def run(self, subject: Subject) -> Outcome:
        """Answer the task.

        Args:
            subject: the model.

        Returns:
            The task's metrics as `metric,filter`, with scores per item.

        Raises:
            ConfigError: if the model cannot be evaluated so.
        """
        from l2d_framework.evaluation.lm_eval.harness import Request, evaluate

        found = evaluate(
            Request(
                subject.path,
                {"dtype": subject.dtype} | self.options | subject.options | {"seed": subject.seed},
                device=subject.device,
                batch_size=self.batch_size or subject.batch_size,
            ),
            self.task,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            chat=self.chat,
        )
        return Outcome(values={name: Value(**numbers) for name, numbers in found.values.items()}, details=found.details)
