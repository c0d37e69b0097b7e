"""Layers as torch.compile makes them: what stands around a projection becomes one kernel."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from l2d_plugins.backbones.shadow import MainKeys

COMPILER = "inductor"
"""torch's name of who compiles."""

_LOGGER = logging.getLogger(__name__)


class _LayerKeys:
    """A read-only cache of one layer; it is asked for no number, so that layers that are built alike share code."""

    def __init__(self, layer: Any) -> None:
        self._keys, self._values = layer.keys, layer.values

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, heads, T, head size)."""
        return self._keys, self._values


class Compiled:
    """Runs layers as torch.compile makes them, once for all that are built alike and for every length of text.

    One row and several, masks and none, and a folded adapter are forms of their own.

    Where that fails, which is said once, they run as they are.
    """

    def __init__(self) -> None:
        self._has_failed = False

    def __call__(self, layer: nn.Module, y: Tensor, modulation: Tensor, kwargs: dict[str, Any], number: int) -> Tensor:
        """Run the layer of this number."""
        if not self._has_failed:
            given = {
                name: _LayerKeys(value.cache.layers[number]) if isinstance(value, MainKeys) else value
                for name, value in kwargs.items()
            }
            try:
                return _compiled(COMPILER)(layer, y, modulation, given)
            except TorchDynamoException as error:
                self._has_failed = True
                why = " ".join(str(error).split("\n")[:2])
                advice = "inductor needs a C++ compiler, or Triton on a GPU. Leave compile out if it cannot be had."
                warnings.warn(f"Layers are not compiled, since that fails: {why} {advice}", UserWarning, stacklevel=2)
        return run(layer, y, modulation, kwargs)


def run(layer: nn.Module, y: Tensor, modulation: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Run a layer as it is."""
    return layer(y, modulation, kwargs)  # type: ignore[no-any-return]


@cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    _LOGGER.warning(
        "Layers are compiled as they first run, which takes tens of seconds and comes again where one prompt becomes "
        "several."
    )
    # Of all models of a process, with masks and without, of one row and of several: torch's 8 forms are soon used up,
    # and then it compiles no more without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(run, backend=backend, dynamic=True)
