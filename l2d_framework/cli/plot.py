"""`l2d plot`: how runs went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l2d_framework.errors import ConfigError


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Output folders of runs, finished or not.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("l2d-plot.png"),
) -> None:
    """Draw loss, loss by t, learning rate and held-out measurements of runs into one picture."""
    from l2d_framework.cli import common
    from l2d_framework.evaluation import plots
    from l2d_framework.evaluation.history import draw_histories, read_history

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {str(out)!r} must end in .png. Name another.")
    common.check_file(out, "--out")
    histories = {name: read_history(run) for name, run in common.named(runs).items()}
    if not plots.can_plot():
        raise ConfigError(f"Pictures need matplotlib. {plots.INSTALL}")
    draw_histories(histories, out)
    typer.echo(f"Written to {out}")
