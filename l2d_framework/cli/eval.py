"""`l2d eval`: lm_eval with the model `l2d`."""

from __future__ import annotations

import typer

app = typer.Typer(add_completion=False)


@app.command(
    name="eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def evaluate(ctx: typer.Context) -> None:
    """Evaluate a model on the tasks of lm_eval, whose options these are: `l2d eval --help` lists them."""
    from l2d_framework.evaluation.harness.command import run

    run(ctx.args or ["--help"])
