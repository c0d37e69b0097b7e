"""A run on its way: its output folder, its card, and what every kind of run does before and after it trains."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from l2d_framework.base_model import check_vocabulary, load_config, load_tokenizer
from l2d_framework.config import ModelSection, Run, config_hash
from l2d_framework.errors import ConfigError
from l2d_framework.training import output_dir
from l2d_framework.training.metrics import Stopwatch, peak_memory
from l2d_framework.training.run_record import environment


class Job(TrainerCallback):
    """A run, how it is launched, and its card: the contents of its `run.json`, kept up to date should it be killed."""

    def __init__(self, run: Run, arguments: TrainingArguments, *, overwrite: bool) -> None:
        self.run, self.arguments, self.output = run, arguments, output_folder(run)
        self.writes = arguments.process_index == 0
        self._watch = Stopwatch()
        if overwrite:
            wait()
            if self.writes:
                output_dir.move_aside(self.output)
            wait()
        self.card: dict[str, Any] = output_dir.check_free(self.output, run.model_dump(mode="json")) or {}

    @property
    def is_finished(self) -> bool:
        """Whether an earlier start has finished the run."""
        return bool(self.card.get("finished"))

    def start(self, data: dict[str, Any], seeds: dict[str, int]) -> None:
        """Begin the card, and make the output folder this run's."""
        before = self.card
        self.card = {
            "finished": False,
            "kind": self.run.kind,
            "config_hash": config_hash(self.run),
            "config": self.run.model_dump(mode="json"),
            "seeds": seeds,
            "data": data,
            **environment(int(self.arguments.world_size)),
            "started": before.get("started", _now()),
            "sessions": before.get("sessions", 0) + 1,
            "seconds": before.get("seconds", 0.0),
            "peak_memory": before.get("peak_memory", 0),
        }
        wait()
        if self.writes:
            self.output.mkdir(parents=True, exist_ok=True)
            output_dir.clean_up(self.output)
            output_dir.write_card(self.output, self.card)
        wait()

    def train(self, trainer: Trainer) -> None:
        """Train, going on from the last checkpoint."""
        self._watch.start()
        complete = output_dir.checkpoints(self.output)
        trainer.train(resume_from_checkpoint=str(complete[-1]) if complete else None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102 -- transformers'
        self._measure()
        if self.writes:
            output_dir.write_card(self.output, self.card)

    def finish(self, result: dict[str, Any], write: Callable[[Path], None]) -> dict[str, Any]:
        """Write the model, and the card last: it says that the run is finished."""
        self._measure()
        self.card |= {"finished": True, "ended": _now()}
        self.card["result"] = result | {"peak_memory": self.card["peak_memory"]}
        if self.writes:
            stage = self.output / "final.writing"
            write(stage)
            output_dir.publish(stage, self.output)
            output_dir.write_card(self.output, self.card)
        wait()
        return self.card

    def _measure(self) -> None:
        self.card["seconds"] += self._watch.lap()
        self._watch.start()
        self.card["peak_memory"] = max(self.card["peak_memory"], peak_memory(self.arguments.device))


def output_folder(run: Run) -> Path:
    """Folder that a run writes to."""
    return Path(str(run.output_dir)).expanduser()


def base_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """Tokenizer of the model that a run starts from."""
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ConfigError(f"model.base: {model.base!r} has no tokenizer_config.json. Save its tokenizer there.")
    check_vocabulary(tokenizer, load_config(model), model.base)
    return tokenizer


def wait() -> None:
    """Wait for the other processes of this run."""
    PartialState().wait_for_everyone()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
