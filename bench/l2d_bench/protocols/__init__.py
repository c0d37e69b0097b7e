"""The papers' evaluation protocols: what the task files in `bench/tasks` refer to."""

from __future__ import annotations

from pathlib import Path

import l2d_bench


def folder() -> Path:
    """Folder of the task files.

    Returns:
        That of an installed wheel, or `bench/tasks` of a checkout.
    """
    return l2d_bench.folder() / "tasks"
