"""transformers' Trainer around a `Learner`: exact losses, keyed order, checkpoints that survive a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from typing_extensions import override

from l2d_framework.config import TrainingSection
from l2d_framework.config.sections import Updates
from l2d_framework.training.arguments import learning_rate, total_steps
from l2d_framework.training.data.collate import IGNORED, Collator
from l2d_framework.training.data.prepare import PreparedData
from l2d_framework.training.learner import Learner
from l2d_framework.training.metrics import LossMeter, Stopwatch, peak_memory
from l2d_framework.training.micro_batches import MicroBatches
from l2d_framework.training.output_dir import BEST, checkpoints, remove, staged
from l2d_framework.training.samplers import PADDING, HeldOut, RunOrder, RunStream


class ResumableTrainer(transformers.Trainer):
    """A trainer whose checkpoints survive a kill and whose learning rate is a function of the update alone."""

    training: Updates
    output: Path

    def _share_of_rate(self, step: int, steps: int) -> float:
        """Learning rate of one update, as a share of the one that the run names."""
        raise AssertionError("a subclass says how the learning rate runs")

    @override
    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.create_optimizer(), lambda step: self._share_of_rate(step, num_training_steps)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._staged(self.output / f"checkpoint-{self.state.global_step}") as folder:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.args.should_save:
            for old in checkpoints(self.output)[: -self.training.save_total_limit]:
                remove(old)

    def _staged(self, folder: Path) -> AbstractContextManager[Path]:
        return staged(folder, writes=self.args.should_save, wait=self.accelerator.wait_for_everyone)

    def _report(self, measured: dict[str, float], prefix: str, start: float) -> dict[str, float]:
        metrics = {f"{prefix}_{name}": value for name, value in measured.items()}
        metrics[f"{prefix}_seconds"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


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
        total = steps * training.batch_size
        is_stream = not hasattr(data.train, "__len__")
        if is_stream:
            # A second worker would read the stream a second time.
            arguments.dataloader_num_workers = min(arguments.dataloader_num_workers, 1)
        order = RunStream(data.train, total) if is_stream else RunOrder(data.train, data.order_seed, total)
        multiple = arguments.per_device_eval_batch_size * arguments.world_size if arguments.world_size > 1 else 1
        self.training, self.learner, self.output = training, learner, Path(str(arguments.output_dir))
        self._rows = None if is_stream else len(data.train)
        super().__init__(
            learner,
            arguments,
            data_collator=collate,
            train_dataset=order,
            eval_dataset=None if data.eval is None else HeldOut(data.eval, multiple),
            callbacks=[Boundaries(self._observe), *callbacks],
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
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                return plain(model, part, num_items_in_batch)

        while not self._agreed((losses := self._micro.run(inputs, step)) is not None):
            self._outputs.clear()
            self.learner.zero_grad()
        assert losses is not None  # every process got through, this one too
        if meets_later:
            for parameter in (p for p in self.learner.parameters() if p.requires_grad):
                here = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(here, "mean")
        for outputs in self._outputs:
            self._meter.add(outputs)
            if self.learner.hears_losses:
                self._heard.append(torch.stack([outputs["t"], outputs["cross_entropies"]], 1))
        self._outputs.clear()
        if self._micro.halves and self._said != self._micro.size:
            self._said = self._micro.size
            self.log({"micro_batch_size": self._micro.size})
        return torch.stack(losses).sum()

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
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """What this process has of an update, and the number of supervised tokens in it over all processes."""
        self._stopwatch.start()
        batches = list(islice(epoch_iterator, num_batches))
        counts = [[(batch["labels"] != IGNORED).sum(), (batch["blocks"] >= 0).sum()] for batch in batches]
        tokens = torch.stack([torch.stack(pair) for pair in counts]).sum(0).to(device)
        tokens = self.accelerator.reduce(tokens)
        self._tokens = self._tokens.to(device) + tokens
        return batches, tokens[0]

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
            with self._staged(self.output / BEST) as folder:
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
        if self._rows is not None:
            self.state.epoch = self.state.global_step * self.training.batch_size / self._rows
        super().log(logs)

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the learner's own weights; never the frozen base model."""
        if self.args.should_save:
            self.learner.checkpoint(Path(output_dir) if output_dir else self.output)

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stopwatch.pause()
        super()._save_checkpoint(model, trial)

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.learner.restore(folder)
        for entry in TrainerState.load_from_json(str(folder / "trainer_state.json")).log_history:
            self._said = entry.get("micro_batch_size", self._said)
        if self._micro.halves and self._said is not None:
            self._micro.size = min(self._micro.size, self._said)

    def _observe(self) -> None:
        # Once an update, so that neither micro-batches nor processes change what is learned from it.
        if self._heard:
            padded = self.accelerator.pad_across_processes(torch.cat(self._heard), pad_index=-1)
            draws = self.accelerator.gather(padded)
            t, losses = draws[draws[:, 0] >= 0].unbind(1)
            self.learner.observe(t, losses)
            self._heard.clear()


class Boundaries(TrainerCallback):
    """Logs wherever a resumed run could start, so that its losses are the means over the same updates."""

    def __init__(self, after_update: Callable[[], None] = lambda: None) -> None:
        self._after_update = after_update

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log before saving and at the end."""
        self._after_update()
        control.should_log |= control.should_save or control.should_training_stop
