"""`l2d config` and `l2d params`: check run files, print their schema, count what they train."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from l2d_framework.cli.common import Overrides, RunFile
from l2d_framework.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Check run files; print their JSON schema.",
)


@app.command()
def check(
    run_file: RunFile,
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the complete configuration as JSON.")] = False,
) -> None:
    """Check whatever about a run needs no weights."""
    from l2d_framework.config import load_run

    runs = load_run(run_file, overrides)

    from l2d_framework.config import check_runs, config_hash, resolved_json  # needs transformers

    check_runs(runs)
    if any(run.data is not None for run in runs):
        from l2d_framework.training.run import check_rows  # datasets and the Trainer take seconds

        for note in check_rows(runs):
            typer.echo(note, err=True)
    for run in runs:
        if resolved:
            typer.echo(resolved_json(run), nl=False)
        else:
            typer.echo(f"ok: {run.kind} run, hash {config_hash(run)[:12]}, writes to {run.output_dir or 'nowhere'}")


@app.command()
def schema() -> None:
    """Print the JSON schema of run files, installed plugins included."""
    from l2d_framework.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def params(run_file: RunFile, overrides: Overrides = None) -> None:
    """Count the trainable parameters of a diffusion run by module, on the meta device: no weights are loaded."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from l2d_framework.config import DiffusionRun, load_run

    runs = [run for run in load_run(run_file, overrides) if isinstance(run, DiffusionRun)]
    if not runs:
        raise ConfigError(f"{run_file} holds no diffusion run, so there is nothing to count. Name another file.")

    from l2d_framework.models.checkpoint import build_model

    for run in runs:
        counts = count_by_module(build_model(run, meta=True))
        table = Table("module", box=box.SIMPLE_HEAD, title=run.model.base, show_footer=True)
        table.columns[0].footer = "trainable parameters"
        table.add_column("parameters", f"{sum(counts.values()):,}", justify="right")
        for module, count in counts.items():
            table.add_row(module, f"{count:,}")
        Console().print(table)


def count_by_module(model: nn.Module) -> dict[str, int]:
    """Trainable parameters by module path, with `*` for the number of a layer."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0])] += parameter.numel()
    return dict(counts)
