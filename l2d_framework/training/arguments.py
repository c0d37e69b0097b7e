"""From the `training` section of a run file to transformers' arguments, and what a trainer is fed with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from l2d_framework.config import RewardTraining, TrainingSection
from l2d_framework.errors import ConfigError
from l2d_framework.training.data.collate import Collator


def make_arguments(training: TrainingSection, output: Path, *, seed: int) -> TrainingArguments:
    """transformers' arguments for a `training` section, without the number of updates.

    What this package does itself, such as the learning rate, is left at transformers' defaults.
    """
    refuse_sharding()
    arguments = TrainingArguments(
        output_dir=str(output),
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        bf16=training.bf16,
        max_grad_norm=training.max_grad_norm,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to=training.report_to or "none",
        dataloader_num_workers=training.dataloader_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        train_sampling_strategy="sequential",
        accelerator_config={"dispatch_batches": False},
        disable_tqdm=True,
        ddp_timeout=24 * 3600,  # the other processes wait while the first one tokenizes
    )
    divide_batch(arguments, training)
    return arguments


def refuse_sharding() -> None:
    """Refuse a launcher that shards parameters."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"Training under {name} is not supported. Launch with plain data parallelism (--multi_gpu)."
            )


def divide_batch(arguments: TrainingArguments, training: TrainingSection | RewardTraining) -> None:
    """Divide the batch of an update over processes and micro-batches."""
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process per device; DataParallel would split what is keyed
    micro = training.micro_batch_size or max(training.batch_size // arguments.world_size, 1)
    if training.batch_size % (micro * arguments.world_size):
        raise ConfigError(
            f"training.batch_size {training.batch_size} is no multiple of {micro} sequences in each of "
            f"{arguments.world_size} processes. Change batch_size or micro_batch_size."
        )
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = micro
    arguments.gradient_accumulation_steps = training.batch_size // (micro * arguments.world_size)


@dataclass(frozen=True)
class TrainingData:
    """What a trainer is fed with.

    Attributes:
        train: rows of `PreparedData`.
        eval: rows held out, or None.
        collate: makes batches.
        order_seed: of the order of rows with random access.
    """

    train: Any
    eval: Any | None
    collate: Collator
    order_seed: int


def total_steps(training: TrainingSection, rows: Any) -> int:
    """Optimizer updates of a run."""
    if training.max_steps is not None:
        return training.max_steps
    return max(int(-(-len(rows) * training.epochs // training.batch_size)), 1)
