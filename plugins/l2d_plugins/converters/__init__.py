"""Readers of the authors' checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any

from l2d_framework.hooks import hookimpl
from l2d_plugins.converters.l2d_reference import read_l2d_reference
from l2d_plugins.converters.tess_reference import read_tess1, read_tess2, read_tess2_reward


@hookimpl
def l2d_converters() -> Mapping[str, Callable[..., Any]]:
    """Offer the readers of this folder."""
    return {
        "l2d-reference": read_l2d_reference,
        "tess1": read_tess1,
        "tess2": read_tess2,
        "tess2-reward": read_tess2_reward,
    }
