"""The trainer of next tokens and of denoising: exact losses, keyed order, streams, micro-batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from typing_extensions import override

from l2d_framework.config import TrainingSection
from l2d_framework.errors import DataError, Interrupted
from l2d_framework.training.arguments import learning_rate, total_steps
from l2d_framework.training.data.collate import IGNORED, Collator
from l2d_framework.training.data.prepare import PreparedData
from l2d_framework.training.data.stream import Place, Stream
from l2d_framework.training.learner import Learner
from l2d_framework.training.metrics import LossMeter, Stopwatch, peak_memory
from l2d_framework.training.micro_batches import MicroBatches, average_gradients
from l2d_framework.training.output_dir import BEST
from l2d_framework.training.samplers import PADDING, HeldOut, Portion, RunOrder, RunStream
from l2d_framework.training.trainer import Boundaries, ResumableTrainer


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
            average_gradients((p for p in self.learner.parameters() if p.requires_grad), self.accelerator.reduce)
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
