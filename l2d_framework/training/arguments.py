"""From the `training` section of a run file to transformers' arguments, the number of updates and their rates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from l2d_framework.config import TrainingSection
from l2d_framework.config.sections import Updates
from l2d_framework.errors import ConfigError
from l2d_framework.training import sharding, zero

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def make_arguments(training: TrainingSection, output: Path, *, seed: int) -> TrainingArguments:
    """transformers' arguments for a `training` section, without the number of updates.

    What this package does itself, such as the learning rate, is left at transformers' defaults.
    """
    arguments = arguments_of(
        TrainingArguments,
        training,
        output,
        seed,
        save_strategy="steps",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        dataloader_num_workers=training.dataloader_workers,
        remove_unused_columns=False,
        label_names=["labels"],
        train_sampling_strategy="sequential",
        accelerator_config={"dispatch_batches": False},
    )
    divide_batch(arguments, training)
    # Its trainer divides what a process has of an update itself, so that it can do so again where memory is short.
    arguments.per_device_train_batch_size *= arguments.gradient_accumulation_steps
    arguments.gradient_accumulation_steps = 1
    return arguments


def arguments_of(kind: type[Arguments], training: Updates, output: Path, seed: int, **own: Any) -> Arguments:
    """Arguments of some kind of training; refuses what cannot be trained as the launcher asks."""
    sharding.check(training)
    with zero.unseen():
        return kind(
            output_dir=str(output),
            run_name=output.name,  # what trackers call it
            seed=seed,
            use_cpu=not torch.accelerator.is_available(),
            bf16=training.bf16,
            max_grad_norm=training.max_grad_norm,
            logging_steps=training.logging_steps,
            logging_nan_inf_filter=False,
            report_to=training.report_to or "none",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            ddp_timeout=24 * 3600,  # the other processes wait while the first one tokenizes
            **own,
        )


def divide_batch(arguments: TrainingArguments, training: Updates) -> None:
    """Divide the batch of an update over processes and micro-batches."""
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process per device; DataParallel would split what is keyed
    micro, times = micro_batch(training, arguments.world_size)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = micro
    arguments.gradient_accumulation_steps = times


def micro_batch(training: Updates, devices: int) -> tuple[int, int]:
    """Rows of a micro-batch on each of some devices, and how many of those an update has there.

    Args:
        training: says how large batches are.
        devices: how many, with a process each.

    Returns:
        Rows and micro-batches.

    Raises:
        ConfigError: if a batch cannot be divided so.
    """
    share = max(training.batch_size // devices, 1)
    micro = training.micro_batch_size if isinstance(training.micro_batch_size, int) else share
    if training.batch_size % (micro * devices):
        parts = f"{devices} devices"
        if micro == training.micro_batch_size:
            parts = f"micro_batch_size {micro} on each of {parts}"
        raise ConfigError(
            f"training.batch_size {training.batch_size} is no multiple of {parts}. Change one of these numbers."
        )
    return micro, training.batch_size // (micro * devices)


def total_steps(training: TrainingSection, rows: Any) -> int:
    """Optimizer updates of a run."""
    if training.max_steps is not None:
        return training.max_steps
    return max(int(-(-len(rows) * training.epochs // training.batch_size)), 1)


def total_pair_steps(training: Updates, pairs: int) -> int:
    """Optimizer updates of a run over pairs, where no batch lies across the border of two epochs."""
    return training.max_steps or math.ceil(-(-pairs // training.batch_size) * training.epochs)


def learning_rate(training: TrainingSection, step: int, total_steps: int) -> float:
    """Learning rate of one update.

    Warm-up rises from the final rate and reaches the peak at its last update. The logarithmic one follows
    final + (peak - final) * ln(step + 1) / ln(warmup_steps). Decay ends at the final rate with the last update.

    Source: the authors' released code of arXiv:2501.15781 (DeepSpeed's `WarmupDecayLR` with `warmup_type: log`).
    """
    low, high, warmup = training.final_learning_rate, training.learning_rate, training.warmup_steps
    if training.warmup_ratio is not None:
        warmup = math.ceil(training.warmup_ratio * total_steps)
    if step < warmup and training.warmup == "log":
        share = math.log(step + 1) / math.log(max(warmup, 2))
    elif step < warmup:
        share = (step + 1) / warmup
    else:
        progress = min((step - warmup) / max(total_steps - 1 - warmup, 1), 1.0)
        share = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[
            training.decay
        ]
    return low + (high - low) * share
