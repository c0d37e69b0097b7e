"""Readers of the authors' checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any

from l2d_framework.hooks import hookimpl
from l2d_plugins.converters.l2d_reference import read_l2d_reference


@hookimpl
def l2d_converters() -> Mapping[str, Callable[..., Any]]:
    """Offer the readers of this folder.

    Returns:
        Reader by format name.
    """
    return {"l2d-reference": read_l2d_reference}
