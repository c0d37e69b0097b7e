"""`l2d params`: trainable parameters by module."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from l2d_framework.cli.config import Overrides, RunFile
from l2d_framework.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


def params(run_file: RunFile, overrides: Overrides = None) -> None:
    """Count the trainable parameters of a diffusion run by module, on the meta device: no weights are loaded."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from l2d_framework.config import DiffusionRun, load_run
    from l2d_framework.models.checkpoint import build_model

    runs = [run for run in load_run(run_file, overrides) if isinstance(run, DiffusionRun)]
    if not runs:
        raise ConfigError(f"{run_file} holds no diffusion run, so there is nothing to count. Name another file.")
    console = Console()
    for run in runs:
        counts = count_by_module(build_model(run, meta=True))
        table = Table("module", box=box.SIMPLE_HEAD, title=run.model.base, show_footer=True)
        table.columns[0].footer = "trainable parameters"
        table.add_column("parameters", f"{sum(counts.values()):,}", justify="right")
        for module, count in counts.items():
            table.add_row(module, f"{count:,}")
        console.print(table)


def count_by_module(model: nn.Module) -> dict[str, int]:
    """Trainable parameters by module path, with `*` for the number of a layer."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0])] += parameter.numel()
    return dict(counts)
