"""Folders of reference data, of which the repository holds a small part at most."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def find(variable: str, name: str) -> Path | None:
    """Folder named by an environment variable, else `../shared/NAME` beside the repository, else `tests/NAME/data`.

    None if there is none of these.

    A variable that is set and points nowhere is an error: a run that was meant to check must not skip instead.
    """
    chosen = os.environ.get(variable)
    if chosen:
        if not Path(chosen).is_dir():
            raise FileNotFoundError(f"{variable}={chosen} is not a folder; correct it or unset it.")
        return Path(chosen).resolve()
    folders = (REPOSITORY.parent / "shared" / name, REPOSITORY / "tests" / name / "data")
    return next((folder for folder in folders if folder.is_dir()), None)


def existing(folder: Path, name: str) -> Path:
    """A file of a folder; the test skips where there is none."""
    if not (folder / name).is_file():
        pytest.skip(f"{folder} has no {name}")
    return folder / name
