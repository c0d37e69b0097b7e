"""Folders of reference data that are too large for the repository."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def find(variable: str, name: str) -> Path | None:
    """Folder named by an environment variable, else `../shared/NAME` beside the repository, else None.

    A variable that is set and points nowhere is an error: a run that was meant to check must not skip instead.
    """
    chosen = os.environ.get(variable)
    if chosen:
        if not Path(chosen).is_dir():
            raise FileNotFoundError(f"{variable}={chosen} is not a folder; correct it or unset it.")
        return Path(chosen).resolve()
    beside = REPOSITORY.parent / "shared" / name
    return beside if beside.is_dir() else None
