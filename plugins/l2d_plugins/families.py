"""What to tell whoever has a model that cannot be served: whether its family or an installed release is at fault."""

from __future__ import annotations

from collections.abc import Sequence

TESTED = ("5.17.0", "5.24.0")
"""Oldest and newest release of transformers that the suite was run with."""


def advice(family: str, proven: Sequence[str]) -> str:
    """What to do about a model that cannot be served, whose `model_type` may be among the proven families."""
    if family not in proven:
        stem = family.partition("_")[0]
        others = [name for name in proven if name.partition("_")[0] != stem]
        return f"Choose a model of another family, such as {', '.join(others)}."
    import transformers  # whose module may be another by now: it starts twice when a model is imported by its full name

    oldest, newest = TESTED
    installed = transformers.__version__
    served = f"Family {family!r} is served with transformers {oldest} to {newest}; {installed} is installed"
    if _minor(oldest) <= _minor(installed) <= _minor(newest):
        return f"{served}, so something has changed the model's code or attention. Load it unchanged."
    return f"{served}. Run: pip install 'transformers>={oldest},<={newest}'"


def _minor(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]
