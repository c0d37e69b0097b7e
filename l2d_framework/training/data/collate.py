"""Batches of prepared rows as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from l2d_framework.errors import ConfigError
from l2d_framework.training.data.masking import Masker

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right and numbers the blocks to denoise; `labels` alone says what is counted in the loss."""

    pad_id: int
    block_size: int | None = 1
    pad_to_multiple_of: int = 1
    padding: Literal["none", "target", "context"] = "none"
    """What rows are filled up with to `max_length`: nothing; padding that is denoised and counted, or not counted."""
    max_length: int | None = None
    masker: Masker | None = None
    """Decides what is supervised in the rows' stead."""

    def __post_init__(self) -> None:
        if self.fills and self.max_length is None:
            raise ConfigError(f"padding {self.padding!r} fills rows up to max_length; got None. Give max_length.")
        for name in ("block_size", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tensors of one batch, all int64.

        `input_ids`, `blocks` (-1 absent, 0 known, k >= 1 denoised k-th) and `labels` (-100 where nothing is counted),
        (B, S); `length` without padding, `class_id`, `index` and, if rows have one, `epoch`, (B,).
        """
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        longest = int(lengths.max())
        if self.fills:
            longest = max(longest, self.max_length or 0)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        real = torch.arange(length) < lengths[:, None]
        flags = [row["supervised"] if self.masker is None else self.masker(row) for row in rows]
        ids = torch.full(real.shape, self.pad_id).masked_scatter(real, _joined([row["input_ids"] for row in rows]))
        supervised = torch.zeros_like(real).masked_scatter(real, _joined(flags).bool())
        blocks = real.long() - 1
        counted = supervised | (blocks < 0) if self.padding == "target" else supervised
        denoised = supervised | (blocks < 0) if self.fills else supervised
        blocks = torch.where(denoised, number_blocks(denoised, self.block_size), blocks)
        numbers = ("class_id", "index", *(["epoch"] if "epoch" in rows[0] else []))
        return {
            "input_ids": ids,
            "blocks": blocks,
            "labels": ids.masked_fill(~counted, IGNORED),
            "length": lengths,
            **{name: torch.tensor([int(row[name]) for row in rows]) for name in numbers},
        }

    @property
    def fills(self) -> bool:
        """Whether every row has `max_length` places."""
        return self.padding in ("target", "context")


def _joined(rows: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate(rows)).long()  # a row at a time takes ten times as long


def number_blocks(supervised: Tensor, block_size: int | None) -> Tensor:
    """Number the blocks along each row: 1, 2, ... where supervised, else 0, (B, S), int64.

    Every run of neighbouring supervised tokens is cut into blocks of `block_size`; its last one may be shorter. None
    stands for one block of all of them.
    """
    if block_size is None:
        return supervised.long()
    place = torch.arange(supervised.shape[-1], device=supervised.device)
    first = supervised.clone()
    first[:, 1:] &= ~supervised[:, :-1]
    run_start = torch.where(first, place, 0).cummax(-1).values
    opens = supervised & ((place - run_start) % block_size == 0)
    return opens.long().cumsum(-1) * supervised
