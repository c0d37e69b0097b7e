"""Trackers whose curves a run continues when it goes on, where transformers would begin others."""

from __future__ import annotations

import os
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import TensorBoardCallback
from typing_extensions import override

EVENTS = "runs"
"""Folder in a run's own for the files of TensorBoard, which takes all of them for one run."""


class Curves(TensorBoardCallback):
    """TensorBoard's curves of a run; what was logged behind the checkpoint that it goes on from is hidden."""

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # In a folder of the user's, other runs may have logged, too.
        if state.is_world_process_zero and self.logging_dir is None:
            self.logging_dir = str(Path(args.output_dir) / EVENTS)
            self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
        begin: Any = super().on_train_begin
        begin(args, state, control, **kwargs)


def open_wandb(name: str, mark: str, opened: ExitStack) -> None:
    """Begin, or go on with, the run of Weights & Biases that has an id, unless the caller has begun one."""
    wandb: Any = import_module("wandb")
    if wandb.run is None:
        project = os.environ.get("WANDB_PROJECT", "huggingface")
        wandb.init(project=project, name=name, id=os.environ.get("WANDB_RUN_ID", mark), resume="allow")
        # Or the next stage would log into it.
        opened.push(lambda kind, *_: wandb.finish(exit_code=int(kind is not None)))
