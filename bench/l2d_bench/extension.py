"""How this distribution attaches to `l2d`: a command and a folder of tasks, as any third party's may."""

from pathlib import Path

import typer

from l2d_bench.cli import app
from l2d_bench.protocols import folder
from l2d_framework.hooks import hookimpl


@hookimpl
def l2d_commands() -> dict[str, typer.Typer]:
    """The command `l2d bench`.

    Returns:
        Its app.
    """
    return {"bench": app}


@hookimpl
def l2d_tasks() -> Path:
    """The papers' evaluation protocols.

    Returns:
        Their folder.
    """
    return folder()
