"""`l2d config`: check run files and print their schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Check run files; print their JSON schema.")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file, YAML or JSON.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Replaced values, such as training.max_steps=100.")
]


@app.command()
def check(
    run_file: RunFile,
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the complete configuration as JSON.")] = False,
) -> None:
    """Check everything about a run that can be checked before weights are loaded."""
    from l2d_framework.config import check_runs, config_hash, load_run, resolved_json
    from l2d_framework.training.run import check_rows

    runs = load_run(run_file, overrides)
    check_runs(runs)
    for note in check_rows(runs):
        typer.echo(note, err=True)
    for run in runs:
        if resolved:
            typer.echo(resolved_json(run), nl=False)
        else:
            typer.echo(f"ok: {run.kind} run, hash {config_hash(run)[:12]}, writes to {run.output_dir or 'nowhere'}")


@app.command()
def schema() -> None:
    """Print the JSON schema of run files, complete for the installed plugins."""
    import json

    from l2d_framework.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
