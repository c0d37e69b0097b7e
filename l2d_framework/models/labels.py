"""Class labels of checkpoints; a wrong one is refused without torch where the checkpoint lies on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from l2d_framework.config.files import parse_json, read_text
from l2d_framework.errors import ConfigError, suggest

MANIFEST = "l2d.json"


def check_class(name: str, classes: Sequence[str]) -> None:
    """Refuse a class label that a model with these does not know."""
    if not classes:
        raise ConfigError(f"This model was trained without classes, got the class {name!r}. Leave it out.")
    if name not in classes:
        hint = suggest(str(name), classes) or "."
        raise ConfigError(f"Unknown class {name!r}{hint} This model knows {list(classes)}.")


def check_class_early(path: str, name: str | None) -> None:
    """Refuse a class label that a checkpoint does not know; says nothing where that cannot be read at once."""
    try:
        classes = [str(known) for known in parse_json(read_text(Path(path) / MANIFEST), MANIFEST)["classes"]]
    except (OSError, ValueError, LookupError, TypeError):  # on the hub, or damaged, which whoever opens it will say
        return
    if name is not None:
        check_class(name, classes)
