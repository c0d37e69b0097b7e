"""`l2d plugins`: what is installed."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from l2d_framework.cli import COMMANDS
from l2d_framework.evaluation.tables import terminal
from l2d_framework.hooks import GROUP
from l2d_framework.registry import ALLOW_LIST, DECLARED, PluginRow, declared, extensions, registry


def plugins() -> None:
    """List what plugins offer, with who ships it, and the error of every plugin that cannot be used."""
    rows = [_judged(row) for part in (registry(), extensions()) for row in part.table() if row.status != "disabled"]
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or pipe has no edge to wrap at
    shown = [(row.kind or "-", row.name, row.distribution, row.version, row.status) for row in rows]
    console.print(terminal([("kind", "name", "distribution", "version", "status"), *shown]))
    for row in rows:
        if row.error:
            console.print(f"{row.kind} {row.name}: {row.error}".strip(), markup=False, highlight=False, soft_wrap=True)
    if disabled := [*registry().disabled, *extensions().disabled]:
        console.print(f"{ALLOW_LIST} leaves out {len(disabled)} more.")


def _judged(row: PluginRow) -> PluginRow:
    if row.kind == "command" and row.name in COMMANDS:
        return replace(
            row, status="clash", error=f"Command {row.name!r} is built in; the plugin must choose another name."
        )
    names = declared()
    if row.status == "ok" and row.kind in DECLARED and names.knows_all and row.name not in names.names(row.kind):
        error = (
            f"The metadata of {row.distribution} does not name it, so commands refuse it. Add it there, in "
            f'[project.entry-points."{GROUP}.{row.kind}"], and install {row.distribution} again.'
        )
        return replace(row, status="undeclared", error=error)
    return row
