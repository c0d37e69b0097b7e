"""transformers' Trainer around a `Learner`: exact losses, keyed order, checkpoints that survive a kill."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from l2d_framework.config import TrainingSection
from l2d_framework.training.arguments import TrainingData, total_steps
from l2d_framework.training.data.collate import IGNORED
from l2d_framework.training.learner import Learner
from l2d_framework.training.learning_rate import learning_rate
from l2d_framework.training.metrics import LossMeter, Stopwatch, peak_memory
from l2d_framework.training.output_dir import BEST, checkpoints, remove, staged
from l2d_framework.training.samplers import PADDING, EpochCollator, HeldOut, RunOrder, RunStream


class TokenTrainer(transformers.Trainer):
    """Trains a `Learner` such that only the configuration and the data decide the result.

    The loss of an update is the mean over all its supervised tokens, however they are spread over micro-batches and
    processes. Every example is seen in keyed order with its own epoch, so resumption continues the same sequence.

    Args:
        learner: what to train.
        arguments: from `make_arguments`.
        training: the `training` section.
        data: training and held-out rows.
        callbacks: further callbacks, such as a progress bar.
    """

    def __init__(
        self,
        learner: Learner,
        arguments: TrainingArguments,
        *,
        training: TrainingSection,
        data: TrainingData,
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
            data_collator=EpochCollator(data.collate),
            train_dataset=order,
            eval_dataset=None if data.eval is None else HeldOut(data.eval, multiple),
            callbacks=[Boundaries(), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._meter = LossMeter(arguments.device)
        self._tokens = torch.zeros(2, dtype=torch.int64)
        self._stopwatch = Stopwatch()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over everything trainable, with weight decay on matrices only and the groups that the backbone names.

        Args:
            model: the module that holds the parameters; the learner when None.

        Returns:
            The optimizer.
        """
        if self.optimizer is None:
            rate, decay = self.training.learning_rate, self.training.weight_decay
            named = self.learner.parameter_groups()
            rates = {"time": self.training.time_learning_rate}
            alone = {id(p) for group in named.values() for p in group}
            parameters = [p for p in (model or self.learner).parameters() if p.requires_grad and id(p) not in alone]
            groups = [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
                *(
                    {
                        "params": [p for p in group if p.requires_grad],
                        "weight_decay": 0.0,
                        "lr": rates.get(name) or rate,
                    }
                    for name, group in named.items()
                ),
            ]
            self.optimizer = AdamW(
                [group for group in groups if group["params"]],
                lr=rate,
                betas=self.training.betas,
                eps=self.training.eps,
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Learning rates of the run.

        Args:
            num_training_steps: updates of the whole run.
            optimizer: the optimizer; the trainer's own when None.

        Returns:
            The schedule.
        """
        if self.lr_scheduler is None:
            training = self.training

            def factor(step: int) -> float:
                return learning_rate(training, step, num_training_steps) / training.learning_rate

            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Micro-batches of one update and the number of supervised tokens in it, over all processes.

        Args:
            epoch_iterator: of micro-batches.
            num_batches: how many this process takes.
            device: where to count.

        Returns:
            The micro-batches and the number, ().
        """
        self._stopwatch.start()
        batches = list(islice(epoch_iterator, num_batches))
        counts = [[(batch["labels"] != IGNORED).sum(), (batch["blocks"] >= 0).sum()] for batch in batches]
        tokens = torch.stack([torch.stack(pair) for pair in counts]).sum(0).to(device)
        tokens = self.accelerator.reduce(tokens)
        self._tokens = self._tokens.to(device) + tokens
        return batches, tokens[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share in the mean over the supervised tokens of the update.

        Args:
            model: the learner, possibly wrapped.
            inputs: a batch.
            return_outputs: also return what the learner returned.
            num_items_in_batch: supervised tokens of the update over all processes.

        Returns:
            The loss, (), or (loss, outputs); times the number of processes, whose gradients are averaged.
        """
        assert num_items_in_batch is not None  # `get_batch_samples` always counts
        outputs = model(**inputs)
        self._meter.add(outputs)
        loss = outputs["loss"] * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all held-out supervised tokens, and in each bin of t, with the same noise at every call.

        Args:
            eval_dataset: a `HeldOut`; the trainer's own when None.
            ignore_keys: unused, for the Trainer's signature.
            metric_key_prefix: put before every name.

        Returns:
            `eval_loss`, `eval_loss_t00` to `eval_loss_t09` and `eval_seconds`.
        """
        self._stopwatch.pause()
        start = time.perf_counter()
        meter = LossMeter(self.args.device)
        self.learner.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for batch in self.get_eval_dataloader(eval_dataset):
                meter.add(self.learner(**batch), batch["index"] != PADDING)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = meter.results(self.accelerator, f"{metric_key_prefix}_")
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        is_best = self.state.best_metric is None or metrics[f"{metric_key_prefix}_loss"] < self.state.best_metric
        if self.is_in_train and is_best:
            with self._staged(self.output / BEST) as folder:
                if self.args.should_save:
                    self.learner.save(folder, "")
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with losses by t, speed and memory beside every training loss.

        Args:
            logs: what to log; changed in place.
            start_time: unused, for the Trainer's signature.
        """
        if "loss" in logs:
            seconds = self._stopwatch.lap()
            tokens = int(self._tokens[1])
            self._tokens.zero_()
            by_time = self._meter.results(self.accelerator)
            logs |= {name: value for name, value in by_time.items() if name != "loss"}
            logs["tokens_per_second"] = tokens / seconds if seconds else 0.0
            logs["peak_memory"] = peak_memory(self.args.device)
        if self._rows is not None:
            self.state.epoch = self.state.global_step * self.training.batch_size / self._rows
        super().log(logs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the learner's own weights; never the frozen base model.

        Args:
            output_dir: where to; the output folder when None.
            _internal_call: unused, for the Trainer's signature.
        """
        if self.args.should_save:
            self.learner.checkpoint(Path(output_dir) if output_dir else self.output)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stopwatch.pause()
        with self._staged(self.output / f"checkpoint-{self.state.global_step}") as folder:
            self.save_model(str(folder))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.args.should_save:
            for old in checkpoints(self.output)[: -self.training.save_total_limit]:
                remove(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.learner.restore(Path(resume_from_checkpoint))

    def _staged(self, folder: Path) -> AbstractContextManager[Path]:
        return staged(folder, writes=self.args.should_save, wait=self.accelerator.wait_for_everyone)


class Boundaries(TrainerCallback):
    """Logs wherever a resumed run could start, so that its losses are the means over the same updates."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log before saving and at the end."""
        control.should_log |= control.should_save or control.should_training_stop
