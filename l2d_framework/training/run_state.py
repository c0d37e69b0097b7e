"""A run on its way: its output folder, its card, and what every kind of run does before and after it trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from l2d_framework.base_model import check_vocabulary, load_config, load_tokenizer
from l2d_framework.config import ModelSection, Run, config_hash, resolved_json
from l2d_framework.errors import ConfigError
from l2d_framework.training import output_dir
from l2d_framework.training.metrics import Stopwatch, peak_memory
from l2d_framework.training.run_record import environment


@dataclass
class Job:
    """A run, which has data and an output folder, how it is launched, and its card, the contents of its `run.json`."""

    run: Run
    arguments: TrainingArguments
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """The output folder."""
        return output_folder(self.run)

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return bool(self.arguments.process_index == 0)

    def earlier(self, *, overwrite: bool) -> dict[str, Any] | None:
        """Card of an earlier start of this run, or None for a fresh folder."""
        if overwrite:
            wait()
            if self.writes:
                output_dir.move_aside(self.output)
            wait()
        return output_dir.check_free(self.output, resolved(self.run))

    def start(self, data: dict[str, Any], seeds: dict[str, int], earlier: dict[str, Any] | None) -> None:
        """Begin the card."""
        before = earlier or {}
        self.card = {
            "finished": False,
            "kind": self.run.kind,
            "config_hash": config_hash(self.run),
            "config": resolved(self.run),
            "seeds": seeds,
            "data": data,
            **environment(int(self.arguments.world_size)),
            "started": before.get("started", _now()),
            "sessions": before.get("sessions", 0) + 1,
            "seconds": before.get("seconds", 0.0),
            "peak_memory": before.get("peak_memory", 0),
        }

    def claim(self) -> None:
        """Make the output folder this run's."""
        self.output.mkdir(parents=True, exist_ok=True)
        output_dir.clean_up(self.output)
        output_dir.write_card(self.output, self.card)

    def finish(self, result: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Write the model, and the card last: it says that the run is finished."""
        self.card |= {"finished": True, "ended": _now()}
        self.card["result"] = result | {"peak_memory": self.card["peak_memory"]}
        if self.writes:
            stage = self.output / "final.writing"
            write(stage)
            output_dir.publish(stage, self.output)
            output_dir.write_card(self.output, self.card)


class CardKeeper(TrainerCallback):
    """Keeps the time and memory a run has taken so far in its card, for a session that may be killed."""

    def __init__(self, job: Job) -> None:
        self._job, self._watch = job, Stopwatch()
        self._watch.start()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102 -- transformers'
        self.keep()

    def keep(self) -> None:
        """Bring the card up to date."""
        card = self._job.card
        card["seconds"] += self._watch.lap()
        self._watch.start()
        card["peak_memory"] = max(card["peak_memory"], peak_memory(self._job.arguments.device))
        if self._job.writes:
            output_dir.write_card(self._job.output, card)


def output_folder(run: Run) -> Path:
    """Folder that a run writes to."""
    return Path(str(run.output_dir)).expanduser()


def resolved(run: Run) -> dict[str, Any]:
    """A run with nothing left out."""
    return dict(json.loads(resolved_json(run)))


def base_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """Tokenizer of the model that a run starts from."""
    found = load_tokenizer(model)
    if found is None:
        raise ConfigError(f"model.base: {model.base!r} has no tokenizer_config.json. Save its tokenizer there.")
    check_vocabulary(found, load_config(model), model.base)
    return found


def wait() -> None:
    """Wait for the other processes of this run."""
    PartialState().wait_for_everyone()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
