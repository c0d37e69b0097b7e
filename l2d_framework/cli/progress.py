"""Progress of a training run on the terminal: a bar for readers, a line per log for log files."""

from __future__ import annotations

import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from typing_extensions import override

from l2d_framework.cli.meter import Meter
from l2d_framework.writing import speed


class Reporter(TrainerCallback):
    """Reports on a run from the first process: until it trains, that it is being prepared."""

    def __init__(self, title: str) -> None:
        self._preparing = ExitStack()
        self._meter = self._preparing.enter_context(Meter(f"{title}  preparing"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102 -- transformers'
        self._preparing.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self._preparing.close()


def progress(console: Console, title: str) -> Reporter:
    """Callback that suits the console."""
    return _Bar(console, title) if console.is_terminal else _Lines(console, title)


def _facts(logs: dict[str, float]) -> str:
    names = {"loss": "loss {:.4f}".format, "eval_loss": "held out {:.4f}".format, "tokens_per_second": speed}
    names |= {"micro_batch_size": "micro-batches of {}".format}
    names |= {"accuracy": "right {:.0%}".format, "eval_accuracy": "right of held out {:.0%}".format}
    return "  ".join(text(logs[name]) for name, text in names.items() if name in logs)


class _Lines(Reporter):
    """The first update is reported without its loss, which the log has once it is a mean over some."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(title)
        self._console, self._title = console, title
        self._start = time.monotonic()
        self._first: tuple[int, float] | None = None  # update of this session, and when it had ended

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.monotonic()
        self._meter.title = f"{self._title}  {state.global_step}/{state.max_steps}  in its first update"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._first is None and state.is_world_process_zero:
            self.close()
            self._first = state.global_step, time.monotonic()
            self._print(state, f"first update after {self._first[1] - self._start:,.1f} s")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and (facts := _facts(logs)):
            self._print(state, facts + self._left(state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def _left(self, state: Any) -> str:
        """Time for the updates to come, as those after the first one went."""
        step, since = self._first or (state.global_step, 0.0)
        if state.global_step == step or state.global_step == state.max_steps:
            return ""
        seconds = (time.monotonic() - since) / (state.global_step - step) * (state.max_steps - state.global_step)
        return f"  {timedelta(seconds=round(seconds))} left"

    def _print(self, state: Any, text: str) -> None:
        text = f"{self._title}  {state.global_step}/{state.max_steps}  {text}"
        self._console.print(text, highlight=False, soft_wrap=True)


class _Bar(Reporter):
    def __init__(self, console: Console, title: str) -> None:
        super().__init__(title)
        self._title, self._task, self._logs = title, TaskID(0), dict[str, float]()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self._task = self._progress.add_task(self._title, total=state.max_steps, facts="")
            # What an earlier session did says nothing about the time this one needs.
            self._progress.update(self._task, completed=state.global_step)
            self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._logs |= logs
            self._progress.update(self._task, facts=_facts(self._logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    @override
    def close(self) -> None:
        super().close()
        self._progress.stop()
