"""`l2d convert`: checkpoints of other code bases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l2d_framework.cli.completion import names


def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub id of the foreign checkpoint.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    reader: Annotated[
        str,
        typer.Option(
            "--from",
            help="Format, such as l2d-reference, tess2, tess2-reward or tess1.",
            autocompletion=names("converter"),
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="The language model. Where it stays frozen, the checkpoint's own copy is written to OUT/base without "
            "it; where it is trained, it supplies only weights that the checkpoint has lost."
        ),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Names of the class labels, separated by commas.")] = None,
) -> None:
    """Convert a checkpoint of another code base."""
    from l2d_framework.registry import declared

    declared().check_name("converter", reader)

    from l2d_framework.cli.common import quieten
    from l2d_framework.cli.meter import Meter
    from l2d_framework.models.convert import convert as run
    from l2d_framework.models.diffusion_lm import DiffusionLM

    names = None if classes is None else tuple(name.strip() for name in classes.split(","))
    quieten()
    with Meter(f"converting {source}"):
        model = run(source, out, reader=reader, base=base, classes=names, tell=lambda note: typer.echo(f"Note: {note}"))
    if isinstance(model, DiffusionLM):
        count = sum(parameter.numel() for parameter in model.own_parameters().values())
        typer.echo(f"Wrote {count:,} diffusion parameters to {out}. Try: l2d generate {out} --prompt '...'")
    else:
        guidance = f"--guidance reward_gradient --set guidance.0.model={out}"
        typer.echo(f"Wrote a reward model to {out}. Try: l2d generate CHECKPOINT {guidance} --prompt '...'")
