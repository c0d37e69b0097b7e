"""The papers' evaluation protocols: what the task files in `bench/tasks` refer to."""

from __future__ import annotations

from pathlib import Path

import l2d_framework


def folder() -> Path:
    """Folder of the task files, for `--include_path`.

    Returns:
        That of an installed wheel, or `bench/tasks` of a checkout.
    """
    package = Path(l2d_framework.__file__).parent
    installed = package / "_bench" / "tasks"
    return installed if installed.is_dir() else package.parent / "bench" / "tasks"
