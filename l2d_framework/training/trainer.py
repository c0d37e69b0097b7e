"""transformers' Trainer with checkpoints that survive a kill, whatever is trained."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from typing_extensions import override

from l2d_framework.backbone import stacked
from l2d_framework.config.sections import Updates
from l2d_framework.errors import DivergedError, L2DError, OutputError
from l2d_framework.opening import open_model
from l2d_framework.training import sharding, zero
from l2d_framework.training.interruption import Interruption
from l2d_framework.training.output_dir import DIVERGED, checkpoints, kept, last_whole, remove, seal
from l2d_framework.writing import staged

_LOGGER = logging.getLogger(__name__)


class ResumableTrainer(transformers.Trainer):
    """A trainer whose checkpoints survive a kill and whose learning rate is a function of the update alone.

    An update whose loss or gradient is no number changes nothing: training stops, or goes on with the next.
    """

    training: Updates
    output: Path
    interruption: Interruption | None = None
    ended_by = 0
    """Signal that ended training before its last update, or 0."""
    failure: L2DError | None = None
    """Why there was nothing to read for an update, which ended training before it."""
    _saved = 0
    # Update of the last checkpoint.
    _skipped_in_a_row = 0
    _updates = _skipped = 0
    # Both since the last log.

    def _share_of_rate(self, step: int, steps: int) -> float:
        """Learning rate of one update, as a share of the one that the run names."""
        raise AssertionError("a subclass says how the learning rate runs")

    def _units(self, model: nn.Module) -> Sequence[Sequence[nn.Module]]:
        """What of a model is gathered together where its weights are in shares."""
        return stacked(model)

    @override
    def create_accelerator_and_postprocess(self) -> None:
        with zero.unseen():
            super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = sharding.adopt(self.accelerator, self._units)
        self._in_shares = zero.adopt(self.accelerator, self.training.max_grad_norm) or self.is_fsdp_enabled

    @override
    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.create_optimizer(), lambda step: self._share_of_rate(step, num_training_steps)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @override
    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._begin(found[0])
        return found

    def _begin(self, batches: list[Any]) -> None:
        """Remember what an update begins with, should it have to be left out or shown."""
        if self.interruption is not None:
            self.interruption.begins()
        self._batches, self._loss_before, self._random_before = batches, self._tr_loss.clone(), RandomState.now()

    @override
    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        plain: Any = super()
        norm = sharding.whole_tensor(torch.as_tensor(plain._clip_grad_norm(model))).to(self._tr_loss.device)
        signum = self.interruption.signum if self.interruption else 0
        is_sound, self.ended_by = self._agree(self._tr_loss.isfinite() & norm.isfinite(), signum)
        if self.interruption is not None:
            self.interruption.ends()
        self._updates += 1
        if is_sound:
            self._skipped_in_a_row = 0
            self._accept()
        else:
            self._leave_out(model, norm)
        return norm

    def heard(self) -> int:
        """Signal that ended training, or that any process has got since its last update; 0 for none."""
        signum = self.interruption.signum if self.interruption else 0
        return self.ended_by or self._agree(torch.ones((), dtype=torch.bool, device=self.args.device), signum)[1]

    def _agree(self, is_sound: Tensor, signum: int) -> tuple[bool, int]:
        """Whether an update is sound in all processes, and a signal that any of them has got."""
        if self.accelerator.num_processes > 1:
            # The one place in an update where the host waits for the device, so the signal comes along.
            state = torch.stack([~is_sound, torch.zeros_like(is_sound)]).long()
            state[1] = signum
            unsound, signum = self.accelerator.gather(state[None]).amax(0).tolist()
            return not unsound, signum
        return bool(is_sound), signum

    def _accept(self) -> None:
        """Take in what a sound update has measured."""

    def _leave_out(self, model: nn.Module, norm: Tensor) -> None:
        loss = float(self._tr_loss - self._loss_before)
        what = f"Update {self.state.global_step + 1}: loss {loss:.4g}, gradient norm {float(norm):.4g}."
        self._skipped += 1
        self._skipped_in_a_row += 1
        limit = self.training.skip_limit
        if self.training.non_finite == "skip" and self._skipped_in_a_row <= limit:
            _LOGGER.warning("%s It is left out, %d in a row.", what, self._skipped_in_a_row)
            # An optimizer passes over what has no gradient, its moments and decay included.
            model.zero_grad()
            self._tr_loss.copy_(self._loss_before)
            return
        again = (
            f"It is the {limit + 1}th in a row, and training.skip_limit is {limit}."
            if self.training.non_finite == "skip"
            else "training.non_finite=skip would leave such updates out."
        )
        raise DivergedError(
            f"{what} It has changed no weight. {self._last_checkpoint()} {self._show(what)} Lower "
            f"training.learning_rate or warm up for longer, in another output_dir. {again}"
        )

    def _last_checkpoint(self) -> str:
        left = last_whole(self.output)
        return f"The last checkpoint is {str(left)!r}." if left else "There was no checkpoint yet."

    def _show(self, what: str) -> str:
        """Write what an unsound update began with; says where."""
        self._random_before.set()
        target, step = self.output / DIVERGED, self.state.global_step
        try:
            with self._staged(target) as folder:
                self._write_state(folder / f"checkpoint-{step}")
                torch.save(self._batches, folder / f"batches_{self.args.process_index}.pt")
                if self.args.should_save:
                    (folder / "what.txt").write_text(f"{what}\n", encoding="utf-8")
        except OutputError as error:
            return f"What it began with is lost: {error}"
        return f"What it began with is in {str(target)!r}: a checkpoint and the batches of each process."

    def check_weights(self) -> None:
        """Refuse weights that are no numbers, so that no checkpoint and no model has them."""
        model: Any = self.model
        trained = [
            sharding.own_share(parameter.detach()) for parameter in model.parameters() if parameter.requires_grad
        ]
        if not self._agree(torch.stack([values.isfinite().all() for values in trained]).all(), 0)[0]:
            raise DivergedError(
                f"After update {self.state.global_step} a weight is infinite or no number. {self._last_checkpoint()} "
                "Lower training.learning_rate or warm up for longer, in another output_dir."
            )

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        target = self.output / f"checkpoint-{self.state.global_step}"
        with self._staged(target) as folder:
            self._write_state(folder)
        self._saved = self.state.global_step
        if self.args.should_save:
            # Behind this one are damaged ones that were passed over.
            known = checkpoints(self.output)
            for old in known[: known.index(target) + 1][: -self.training.save_total_limit]:
                remove(old)

    def _write_state(self, folder: Path) -> None:
        if self.args.should_save:
            folder.mkdir(exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self._save_place(folder)
        if self.args.should_save:
            # With intervals, which transformers takes from there; here those of the run file hold whenever it goes on.
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)

    def _save_place(self, folder: Path) -> None:
        """Write where the data go on, unless the update tells it."""

    def whole(self) -> AbstractContextManager[None]:
        """Let the process that writes see all that is trained, whatever the shares; every process must enter."""
        model: Any = self.model
        return sharding.whole(model, reads=self.args.should_save)

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained such that it can be gone on from, by any number of processes."""
        with self.whole():
            if self.args.should_save:
                self._write_weights(Path(output_dir) if output_dir else self.output)

    def _write_weights(self, folder: Path) -> None:
        self._save(str(folder))

    @override
    def train(self, resume_from_checkpoint: str | bool | None = None, *options: Any, **named: Any) -> Any:
        if self.is_fsdp_enabled and isinstance(resume_from_checkpoint, str):
            # While they are whole; transformers would ask for them when they are in shares.
            self._read_weights(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *options, **named)

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            self._read_weights(Path(resume_from_checkpoint))

    def _read_weights(self, folder: Path) -> None:
        lm: Any = self.model
        lm.load_state_dict(open_model(type(lm), folder, dtype=torch.float32)[0].state_dict())

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._in_shares:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer, scheduler = self._stateful()
        state = sharding.whole_state(optimizer, reads=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self._in_shares:
            optimizer, scheduler = self._stateful()
            sharding.load_state(optimizer, Path(checkpoint) / OPTIMIZER_NAME)
            scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, scheduler = self._stateful()
        # The rates of a checkpoint are those of the number of updates that were wanted then.
        self.lr_scheduler = LambdaLR(optimizer, scheduler.lr_lambdas, last_epoch=scheduler.last_epoch - 1)

    def _stateful(self) -> tuple[Optimizer, LambdaLR]:
        assert self.optimizer is not None and self.lr_scheduler is not None  # training has begun
        return self.optimizer, self.lr_scheduler

    def _staged(self, folder: Path) -> AbstractContextManager[Path]:
        return staged(
            folder, writes=self.args.should_save, wait=self.accelerator.wait_for_everyone, advice=kept(self.output)
        )

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if self._skipped:
                logs["skipped_updates"] = self._skipped
                # The trainer divides by all updates.
                logs["loss"] *= self._updates / max(self._updates - self._skipped, 1)
                if self._skipped == self._updates:
                    del logs["loss"]
            self._updates = self._skipped = 0
        super().log(logs, start_time)

    def _report(self, measured: dict[str, float], prefix: str, start: float) -> dict[str, float]:
        if not math.isfinite(measured["loss"]):
            raise DivergedError(
                f"After update {self.state.global_step} the held-out loss is {measured['loss']}. "
                f"{self._last_checkpoint()} Lower training.learning_rate or warm up for longer, in another output_dir."
            )
        metrics = {f"{prefix}_{name}": value for name, value in measured.items()}
        metrics[f"{prefix}_seconds"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class RandomState(NamedTuple):
    """States of torch's global random numbers, on the CPU and on this process's GPU."""

    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """The present ones."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    def set(self) -> None:
        """Make them the present ones."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)


class Boundaries(TrainerCallback):
    """Ends training where a signal asks for it, and logs wherever a resumed run could start.

    So its losses are the means over the same updates. Intervals are those of this start.
    """

    def __init__(
        self,
        ended_by: Callable[[], int],
        after_update: Callable[[], None] = lambda: None,
        is_unsaved_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self._ended_by, self._after_update, self._is_unsaved_end = ended_by, after_update, is_unsaved_end

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget the intervals that a checkpoint was made with."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log before saving and at the end."""
        self._after_update()
        if self._ended_by():
            control.should_save = control.should_training_stop = True
        control.should_log |= control.should_save or control.should_training_stop

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and log where there was nothing to read for a further update."""
        if self._is_unsaved_end():
            control.should_save = control.should_log = True
