"""transformers' Trainer around a `Learner`: exact losses, keyed order, checkpoints that survive a kill."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import IntervalStrategy
from typing_extensions import override

from l2d_framework.backbone import stacked
from l2d_framework.config import TrainingSection
from l2d_framework.config.sections import Updates
from l2d_framework.errors import DataError, DivergedError, Interrupted, L2DError, OutputError
from l2d_framework.opening import open_model
from l2d_framework.training import sharding
from l2d_framework.training.arguments import learning_rate, total_steps
from l2d_framework.training.data.collate import IGNORED, Collator
from l2d_framework.training.data.prepare import PreparedData
from l2d_framework.training.data.stream import Place, Stream
from l2d_framework.training.interruption import Interruption
from l2d_framework.training.learner import Learner
from l2d_framework.training.metrics import LossMeter, Stopwatch, peak_memory
from l2d_framework.training.micro_batches import MicroBatches
from l2d_framework.training.output_dir import BEST, DIVERGED, checkpoints, kept, remove, seal
from l2d_framework.training.samplers import PADDING, HeldOut, Portion, RunOrder, RunStream
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
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = sharding.adopt(self.accelerator, self._units)

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
        left = checkpoints(self.output)
        return f"The last checkpoint is {str(left[-1])!r}." if left else "There was no checkpoint yet."

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
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer, scheduler = self._stateful()
        state = sharding.whole_state(optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        states = [torch.load(Path(checkpoint) / name, map_location="cpu") for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
        optimizer, scheduler = self._stateful()
        sharding.load_state(optimizer, states[0])
        scheduler.load_state_dict(states[1])

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


class TokenTrainer(ResumableTrainer):
    """Trains a `Learner` such that only the configuration and the data decide the result.

    The loss of an update is the mean over all its supervised tokens, however they are spread over micro-batches and
    processes. Every example is seen in keyed order with its own epoch, so resumption continues the same sequence.
    """

    training: TrainingSection

    def __init__(
        self,
        learner: Learner,
        arguments: TrainingArguments,
        *,
        training: TrainingSection,
        data: PreparedData,
        collate: Collator,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        steps = total_steps(training, data.train)
        arguments.max_steps = steps
        arguments.save_steps = training.save_steps or steps
        arguments.eval_steps = training.eval_steps or steps
        arguments.eval_strategy = IntervalStrategy("no" if data.eval is None else "steps")
        order: Any
        if isinstance(data.train, Stream):
            share = training.batch_size // arguments.world_size
            rows = range(arguments.process_index * share, (arguments.process_index + 1) * share)
            order = RunStream(data.train, collate, updates=steps, batch_size=training.batch_size, rows=rows)
            # It goes on by itself.
            arguments.ignore_data_skip = True
        else:
            order = RunOrder(data.train, data.order_seed, steps * training.batch_size)
        self._stream = order if isinstance(order, RunStream) else None
        self._ahead: Mapping[int, Place] = {}
        self._is_out_of_data = False
        multiple = arguments.per_device_eval_batch_size * arguments.world_size if arguments.world_size > 1 else 1
        self.training, self.learner, self.output = training, learner, Path(str(arguments.output_dir))
        self._rows = None if self._stream else len(data.train)
        super().__init__(
            learner,
            arguments,
            data_collator=collate,
            train_dataset=order,
            eval_dataset=None if data.eval is None else HeldOut(data.eval, multiple),
            callbacks=[Boundaries(lambda: self.ended_by, self._end_update, self._is_unsaved_end), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._meter = LossMeter(arguments.device)
        auto, size = training.micro_batch_size == "auto", arguments.per_device_eval_batch_size
        self._micro = MicroBatches(size, halves=auto, by_length=training.group_by_length)
        self._tokens = torch.zeros(2, dtype=torch.int64)
        self._outputs: list[dict[str, Tensor]] = []
        self._said: int | None = None
        self._stopwatch = Stopwatch()
        self._heard: list[Tensor] = []

    @override
    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW over everything trainable, with weight decay on matrices only and the backbone's groups."""
        if self.optimizer is None:
            rate, decay = self.training.learning_rate, self.training.weight_decay
            named = self.learner.parameter_groups()
            rates = {"time": self.training.time_learning_rate}
            alone = {id(p) for group in named.values() for p in group}
            parameters = [p for p in (model or self.learner).parameters() if p.requires_grad and id(p) not in alone]
            groups: list[dict[str, Any]] = [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ]
            for name, group in named.items():
                trained = [p for p in group if p.requires_grad]
                groups.append({"params": trained, "weight_decay": 0.0, "lr": rates.get(name) or rate})
            self.optimizer = AdamW(
                [group for group in groups if group["params"]],
                lr=rate,
                betas=self.training.betas,
                eps=self.training.eps,
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    @override
    def _share_of_rate(self, step: int, steps: int) -> float:
        return learning_rate(self.training, step, steps) / self.training.learning_rate

    @override
    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process; those of a stream are divided already."""
        if self._stream is None:
            return super().get_train_dataloader()
        return DataLoader(
            self._stream,
            batch_size=None,
            # A second one would read the stream a second time.
            num_workers=min(self.args.dataloader_num_workers, 1),
            pin_memory=self.args.dataloader_pin_memory,
            # Beginning again must not draw from the numbers of the run.
            generator=torch.Generator(),
        )

    @override
    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Gradients of what this process has of an update, a micro-batch at a time; returns its share in the loss."""
        plain, processes = super().training_step, self.accelerator.num_processes
        # A process out of memory would leave the others waiting for its gradients, so these meet when all are through.
        meets_later = self._micro.halves and processes > 1

        def step(part: dict[str, Tensor], is_last: bool) -> Tensor:
            if meets_later:
                return plain(self.learner, part, num_items_in_batch)
            # Where gradients are in shares, all of them would have to be kept whole until the last part.
            syncs = is_last or self.is_fsdp_enabled
            with nullcontext() if syncs else self.accelerator.no_sync(model):
                return plain(model, part, num_items_in_batch)

        while not self._agreed((losses := self._micro.run(inputs, step)) is not None):
            self._outputs.clear()
            self.learner.zero_grad()
        assert losses is not None  # every process got through, this one too
        if meets_later:
            for parameter in (p for p in self.learner.parameters() if p.requires_grad):
                here = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(here, "mean")
        if self._micro.halves and self._said != self._micro.size:
            self._said = self._micro.size
            self.log({"micro_batch_size": self._micro.size})
        return torch.stack(losses).sum()

    @override
    def _accept(self) -> None:
        for outputs in self._outputs:
            self._meter.add(outputs)
            if self.learner.hears_losses:
                self._heard.append(torch.stack([outputs["t"], outputs["cross_entropies"]], 1))
        self._outputs.clear()

    @override
    def _leave_out(self, model: nn.Module, norm: Tensor) -> None:
        self._outputs.clear()
        super()._leave_out(model, norm)

    def _agreed(self, is_through: bool) -> bool:
        """Whether all processes are through with an update; if not, all take the smallest size."""
        if not self._micro.halves:
            return True
        state = torch.tensor([[int(is_through), self._micro.size]], device=self.args.device)
        through, sizes = self.accelerator.gather(state).unbind(1)
        self._micro.size = int(sizes.min())
        return bool(through.all())

    @override
    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """What this process has of an update, and the number of supervised tokens in it over all processes.

        Nothing, if a process has nothing; training then ends.
        """
        self._stopwatch.start()
        if self._stream is None:
            portions = [Portion(batch, {}) for batch in islice(epoch_iterator, num_batches)]
        else:
            portions = [self._read(epoch_iterator)]
        batches = [portion.batch for portion in portions if portion.batch is not None]
        counts = [torch.stack([(batch["labels"] != IGNORED).sum(), (batch["blocks"] >= 0).sum()]) for batch in batches]
        failed = torch.tensor(not batches, device=device)
        tokens = torch.stack(counts).sum(0).to(device) if counts else torch.zeros(2, dtype=torch.int64, device=device)
        tokens = self.accelerator.reduce(torch.cat([tokens, failed[None]]))
        if self._stream is not None:
            if tokens[2]:
                failures = gather_object([portions[0].failure])
                # None where a signal came while it was waited for.
                self.failure = next((failure for failure in failures if failure is not None), None)
                self._is_out_of_data = self.control.should_training_stop = True
                return [], tokens[0]
            self._ahead = portions[0].places
        self._begin(batches)
        self._tokens = self._tokens.to(device) + tokens[:2]
        return batches, tokens[0]

    def _read(self, portions: Iterator[Portion]) -> Portion:
        try:
            with self.interruption.reading() if self.interruption else nullcontext():
                return next(portions)
        except Interrupted:
            return Portion(None, {})
        except RuntimeError as error:
            # torch's words where a worker was killed, such as by a system that is out of memory.
            if not str(error).startswith("DataLoader worker"):
                raise
            return Portion(None, {}, DataError(f"The process that reads the stream has ended: {error}"))

    def _is_unsaved_end(self) -> bool:
        return self._is_out_of_data and self.state.global_step > self._saved

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share in the mean over the update's supervised tokens, times the number of processes."""
        assert num_items_in_batch is not None  # `get_batch_samples` always counts
        outputs = model(**inputs)
        self._outputs.append({name: value.detach() for name, value in outputs.items()})
        loss = outputs["loss"] * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    @override
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all held-out supervised tokens, and in each bin of t, with the same noise at every call."""
        self._stopwatch.pause()
        start = time.perf_counter()
        meter = LossMeter(self.args.device)
        self.learner.eval()

        def losses(part: dict[str, Tensor], _: bool) -> tuple[dict[str, Tensor], Tensor]:
            return self.learner(**part), part["index"] != PADDING

        with torch.no_grad(), self.accelerator.autocast():
            for batch in self.get_eval_dataloader(eval_dataset):
                while (found := self._micro.run(batch, losses, counts=False)) is None:
                    pass
                for outputs, counted in found:
                    meter.add(outputs, counted)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = self._report(meter.results(self.accelerator), metric_key_prefix, start)
        is_best = self.state.best_metric is None or metrics[f"{metric_key_prefix}_loss"] < self.state.best_metric
        if self.is_in_train and is_best:
            with self._staged(self.output / BEST) as folder, self.whole():
                if self.args.should_save:
                    self.learner.save(folder, "")
        return metrics

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with losses by t, speed and memory beside every training loss."""
        if "loss" in logs:
            seconds = self._stopwatch.lap()
            tokens = int(self._tokens[1])
            self._tokens.zero_()
            by_time = self._meter.results(self.accelerator)
            logs |= {name: value for name, value in by_time.items() if name != "loss"}
            logs["tokens_per_second"] = tokens / seconds if seconds else 0.0
            slots = int(self.accelerator.reduce(torch.tensor(self._micro.slots, device=self.args.device)))
            self._micro.slots = 0
            logs["padding"] = 1 - tokens / slots if slots else 0.0
            logs["peak_memory"] = peak_memory(self.args.device)
        # Of a stream, whose length is not known, the whole run.
        rows = self._rows or self.state.max_steps * self.training.batch_size
        self.state.epoch = self.state.global_step * self.training.batch_size / rows
        super().log(logs)

    @override
    def _write_weights(self, folder: Path) -> None:
        self.learner.checkpoint(folder)

    @override
    def _save_place(self, folder: Path) -> None:
        if self._stream is not None:
            self._stream.write(folder)

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stopwatch.pause()
        super()._save_checkpoint(model, trial)

    @override
    def _units(self, model: nn.Module) -> Sequence[Sequence[nn.Module]]:
        return self.learner.units()

    @override
    def _read_weights(self, folder: Path) -> None:
        self.learner.restore(folder)
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self._saved = state.global_step
        if self._stream is not None:
            self._stream.resume(folder, state.global_step)
        for entry in state.log_history:
            self._said = entry.get("micro_batch_size", self._said)
        if self._micro.halves and self._said is not None:
            self._micro.size = min(self._micro.size, self._said)

    def _end_update(self) -> None:
        if self._stream is not None:
            self._stream.places = dict(self._ahead)
        # Once an update, so that neither micro-batches nor processes change what is learned from it.
        if self._heard:
            padded = self.accelerator.pad_across_processes(torch.cat(self._heard), pad_index=-1)
            draws = self.accelerator.gather(padded)
            t, losses = draws[draws[:, 0] >= 0].unbind(1)
            self.learner.observe(t, losses)
            self._heard.clear()


class Boundaries(TrainerCallback):
    """Ends training where a signal asks for it, and logs wherever a resumed run could start.

    So its losses are the means over the same updates.
    """

    def __init__(
        self,
        ended_by: Callable[[], int],
        after_update: Callable[[], None] = lambda: None,
        is_unsaved_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self._ended_by, self._after_update, self._is_unsaved_end = ended_by, after_update, is_unsaved_end

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
