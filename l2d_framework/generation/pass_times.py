"""What a pass of the network takes by the number of positions, on the very device and with the very weights."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch

from l2d_framework.backbone import Backbone
from l2d_framework.diffusion.logits import Logits
from l2d_framework.types import Layout

_REPEATS = 3
_KNOWN: WeakKeyDictionary[Backbone, dict[tuple[Any, ...], list[float]]] = WeakKeyDictionary()
_MEASURING = Lock()
"""Threads that measured at the same time would measure one another."""


def pass_times(backbone: Backbone, sizes: Sequence[int]) -> list[float]:
    """Seconds that passes over so many positions take, measured when first asked for and kept with the network.

    They need not grow with the positions: processors have better kernels for some numbers of rows than for others.

    Args:
        backbone: one with `independent_positions`.
        sizes: numbers of positions.

    Returns:
        The quickest of a few passes of each size, logits included.
    """
    table = backbone.table()
    key = table.device, table.dtype, *sizes
    with _MEASURING:
        known = _KNOWN.setdefault(backbone, {})
        if key not in known:
            known[key] = _measured(backbone, sizes)
        return known[key]


def _measured(backbone: Backbone, sizes: Sequence[int]) -> list[float]:
    device = backbone.table().device
    first = torch.zeros(1, 1, dtype=torch.int64, device=device)
    context = backbone.read(Layout(first, first))
    found = [math.inf] * len(sizes)
    # In turns, so that whatever else the machine does slows all of them alike.
    for _ in range(_REPEATS):
        for number, size in enumerate(sizes):
            h = backbone.table().new_zeros(1, size, backbone.hidden_size)
            t, positions = torch.full((1, size), 0.5, device=device), first.expand(1, size) + 1
            begun = time.perf_counter()
            features = backbone.features(h, t, positions, context, None, shared_time=0.5)
            for _, logits in Logits(features, backbone.vocab_size, backbone.head).parts():
                logits[0, -1, 0].item()  # waits for the device
            found[number] = min(found[number], time.perf_counter() - begun)
    return found
