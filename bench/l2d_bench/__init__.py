"""The papers' tables, figures and evaluation protocols, at any size: `l2d bench` and tasks of lm_eval."""

from pathlib import Path


def folder() -> Path:
    """Folder with `tables`, `profiles`, `runs` and `tasks`.

    Returns:
        That of an installed wheel, or `bench` of a checkout.
    """
    package = Path(__file__).parent
    installed = package / "_files"
    return installed if installed.is_dir() else package.parent
