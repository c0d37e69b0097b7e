"""A run on its way: its output folder, its card, and what every kind of run does before and after it trains."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from l2d_framework.base_model import check_vocabulary, load_config, load_tokenizer, trained_in
from l2d_framework.config import ModelSection, Run, config_hash
from l2d_framework.errors import CheckpointError, ConfigError, DataError, Interrupted
from l2d_framework.opening import TRAINED_IN
from l2d_framework.training import output_dir
from l2d_framework.training.folder_lock import locked
from l2d_framework.training.interruption import Interruption, name_of
from l2d_framework.training.metrics import Stopwatch, peak_memory
from l2d_framework.training.peers import Peers
from l2d_framework.training.run_record import changed_data, environment, now
from l2d_framework.training.trackers import Curves, open_wandb
from l2d_framework.training.trainer import ResumableTrainer
from l2d_framework.writing import naming_what_fails

_LOGGER = logging.getLogger(__name__)


class RunState(TrainerCallback):
    """A run, how it is launched, and its card: the contents of its `run.json`, kept up to date should it be killed.

    While it is entered, no other process can train in its output folder.
    """

    def __init__(self, run: Run, arguments: TrainingArguments, *, overwrite: bool, accept_changed_data: bool) -> None:
        self.run, self.arguments, self.output = run, arguments, output_folder(run)
        # What trackers record of a run: its file, not transformers' arguments, most of which do not hold here.
        arguments.to_dict = partial(dict, run.model_dump(mode="json"))  # type: ignore[method-assign]
        self.writes = arguments.process_index == 0
        self.card: dict[str, Any] = {}
        self._overwrite, self._accepts = overwrite, accept_changed_data
        self._goes_on_from: Path | None = None
        self._watch = Stopwatch()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with self._open:
            wait()
            self._open.enter_context(Peers.of_this_run())
            if self._overwrite and self.writes:
                output_dir.move_aside(self.output)
            wait()
            self._check_free()
            if not self.is_finished and self.writes:
                self._open.enter_context(locked(self.output))
                output_dir.complete(self.output)
            wait()
            # Another process may have had it until now.
            self._check_free()
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def _check_free(self) -> None:
        self.card = output_dir.check_free(self.output, self.run.model_dump(mode="json")) or {}

    @property
    def is_finished(self) -> bool:
        """Whether an earlier start has finished the run."""
        return output_dir.is_done(self.card, self.run.model_dump(mode="json"))

    def start(self, data: dict[str, Any], seeds: dict[str, int], steps: int) -> None:
        """Begin the card, and make the output folder this run's, which is to make so many updates in all."""
        before = self.card
        changes = self._changes(before, data)
        continued = self._continued(before, steps)
        self.card = {
            "finished": False,
            "kind": self.run.kind,
            "config_hash": config_hash(self.run),
            "config": self.run.model_dump(mode="json"),
            "seeds": seeds,
            "data": data,
            **environment(int(self.arguments.world_size)),
            "started": before.get("started", now()),
            "sessions": before.get("sessions", 0) + 1,
            "seconds": before.get("seconds", 0.0),
            "peak_memory": before.get("peak_memory", 0),
            "saved": before.get("saved", 0),
            **({"accepted_changes": changes} if changes else {}),
            **({"continued": continued} if continued else {}),
            **({"moved": moved} if (moved := self._moved(before)) else {}),
            **({TRAINED_IN: place} if (place := trained_in(self.run.model)) else {}),
            **({"base_fingerprint": mark} if (mark := before.get("base_fingerprint")) else {}),
            **({"wandb": mark} if (mark := self._tracked(before)) else {}),
        }
        wait()
        if self.writes:
            output_dir.clean_up(self.output)
            output_dir.write_card(self.output, self.card)
        self._goes_on_from = self._find(steps)

    def _find(self, steps: int) -> Path | None:
        """Checkpoint to go on from, said before weights are loaded, which takes long; None begins from the start."""
        found: list[Path | None] = [output_dir.newest_whole(self.output, _LOGGER.warning)] if self.writes else [None]
        broadcast_object_list(found)
        if self.writes and found[0] is not None:
            made = output_dir.updates_of(found[0])
            _LOGGER.warning("Going on from %r (%s of %s updates).", str(found[0]), f"{made:,}", f"{steps:,}")
        elif self.writes and self.card["sessions"] > 1:
            _LOGGER.warning("%r was begun before and has no checkpoint: it begins from its start.", str(self.output))
        return found[0]

    def _changes(self, before: dict[str, Any], data: dict[str, Any]) -> list[dict[str, Any]]:
        """What a run has gone on with although its data had changed; refused unless that is accepted."""
        accepted: list[dict[str, Any]] = list(before.get("accepted_changes", []))
        saved = output_dir.checkpoints(self.output)
        found = changed_data(before["data"], data) if saved and "data" in before else []
        if not found:
            return accepted
        if not self._accepts:
            raise DataError(
                f"The data have changed since {str(self.output)!r} was begun: {'; '.join(found)}. Restore them, begin "
                "anew in another output_dir or with --overwrite, or go on with --accept-changed-data, which run.json "
                "will tell."
            )
        # After which checkpoint is known once the newest one that is whole has been found.
        return [*accepted, {"at": now(), "changes": found, "data_before": before["data"]}]

    def _continued(self, before: dict[str, Any], steps: int) -> list[dict[str, Any]]:
        """How often, and with what, a run has been given another number of updates."""
        earlier: list[dict[str, Any]] = list(before.get("continued", []))
        if not before:
            return earlier
        output_dir.check_budget(self.output, before, steps)
        changes = output_dir.budget_changes(before, self.run.model_dump(mode="json"))
        made = output_dir.updates_made(self.output, before) if changes else 0
        if not 0 < made < steps:
            return earlier
        if self.writes:
            _LOGGER.warning(
                "%r has made %s updates and goes on to %s (%s). From there its learning rate is that of a run "
                "of %s: where decay or warm-up depend on their number, the updates before had other rates than those "
                "of a run of %s from the start.%s",
                *(str(self.output), f"{made:,}", f"{steps:,}", "; ".join(changes), f"{steps:,}", f"{steps:,}"),
                " The model that is there stays until the new one is whole." if before.get("finished") else "",
            )
        published = {name: before[name] for name in ("ended", "result") if name in before}
        return [*earlier, {"at": now(), "changes": changes, "updates": made, **published}]

    def _moved(self, before: dict[str, Any]) -> list[dict[str, Any]]:
        """When a run went on over the language model of before in another place."""
        changes = output_dir.place_changes(before, self.run.model_dump(mode="json")) if before else []
        return [*before.get("moved", []), *([{"at": now(), "changes": changes}] if changes else [])]

    def describe(self, parameters: Iterable[nn.Parameter], base_fingerprint: str | None) -> None:
        """Put a model on the card, unless it is over another base than before or has no room on the disk."""
        numbers = [(p.numel(), p.requires_grad) for p in parameters]
        trained = sum(count for count, is_trained in numbers if is_trained)
        self.card["parameters"] = {"trainable": trained, "total": sum(count for count, _ in numbers)}
        if base_fingerprint is not None:
            before = self.card.get("base_fingerprint", base_fingerprint)
            if before != base_fingerprint and output_dir.checkpoints(self.output):
                raise CheckpointError(
                    f"model.base has fingerprint {base_fingerprint[:12]}, but {str(self.output)!r} was begun over "
                    f"{before[:12]}. Restore it, or begin anew in another output_dir or with --overwrite."
                )
            self.card["base_fingerprint"] = base_fingerprint
        if self.writes:
            output_dir.check_room(self.output, trained, self.run.training.save_total_limit)

    def train(self, trainer: ResumableTrainer) -> None:
        """Train, going on from the checkpoint that was found; a signal ends it with one more."""
        self._watch.start()
        found = self._goes_on_from
        for change in (
            change for kind in ("accepted_changes", "continued", "moved") for change in self.card.get(kind, [])
        ):
            change.setdefault("after", found and found.name)
        self._open_trackers(trainer)
        with Interruption() as interruption:
            trainer.interruption = interruption
            trainer.train(resume_from_checkpoint=str(found) if found else None)
            signum = trainer.heard()
        if (failure := trainer.failure) is not None:
            raise type(failure)(f"{failure} Training ended {self._farewell(trainer.state)}") from failure
        if signum:
            raise Interrupted(signum, f"{name_of(signum)} {self._farewell(trainer.state)}" if self.writes else "")
        trainer.check_weights()

    def _tracked(self, before: dict[str, Any]) -> str | None:
        """Id of the run in Weights & Biases, which a start without that tracker keeps for the next with it."""
        return before.get("wandb") or (secrets.token_hex(4) if self._reports_to("wandb") else None)

    def _reports_to(self, tracker: str) -> bool:
        return tracker in self.run.training.report_to

    def _open_trackers(self, trainer: ResumableTrainer) -> None:
        if self._reports_to("tensorboard"):
            trainer.remove_callback(TensorBoardCallback)
            trainer.add_callback(Curves)
        if self._reports_to("wandb") and self.writes:
            open_wandb(str(self.arguments.run_name), self.card["wandb"], self._open)

    def _farewell(self, state: TrainerState) -> str:
        # That of this update was just written, or read to go on from.
        here = self.output / f"checkpoint-{state.global_step}"
        left = here if here.is_dir() else output_dir.last_whole(self.output)
        saved = f"saved {str(left)!r}; the same command goes on from there" if left else "nothing is saved"
        return f"after update {state.global_step} of {state.max_steps}: {saved}."

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102 -- transformers'
        self._measure()
        self.card["saved"] = state.global_step
        if self.writes:
            output_dir.write_card(self.output, self.card)

    def finish(self, result: dict[str, Any], write: Callable[[Path], None]) -> dict[str, Any]:
        """Write the model, and the card last: it says that the run is finished."""
        self._measure()
        self.card |= {"finished": True, "ended": now()}
        self.card["result"] = result | {"peak_memory": self.card["peak_memory"]}
        if self.writes:
            stage = self.output / "final.writing"
            with naming_what_fails(self.output, stage, output_dir.kept(self.output)):
                write(stage)
            output_dir.publish(stage, self.output, self.card)
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
