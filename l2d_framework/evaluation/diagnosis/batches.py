"""Held-out rows as batches of supervised positions with names for their noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from l2d_framework.config import DataSection
from l2d_framework.config.validation import validated
from l2d_framework.diffusion.logits import pieces
from l2d_framework.diffusion.rng import TokenStreams, request_keys
from l2d_framework.diffusion.sampler import Block
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.unloaded import UnloadedModel
from l2d_framework.training.data.collate import Collator
from l2d_framework.training.data.prepare import prepare
from l2d_framework.types import Layout


@dataclass(frozen=True)
class Batch:
    """Supervised positions of some rows; L is the largest number per row."""

    rows: list[int]  # which they are, in the order of the data
    layout: Layout
    positions: Tensor  # slots, (B, L), int64; those not valid repeat the row's last
    valid: Tensor  # (B, L), bool
    keys: list[list[tuple[int | str, ...]]]  # for each row, the parts of the key of each position
    condition: Tensor | None  # class per position, (B, L), int64

    @property
    def targets(self) -> Tensor:
        """The true tokens, (B, L), int64."""
        return self.layout.tokens.gather(1, self.positions)

    def noise(self, model: DiffusionLM) -> Tensor:
        """Standard normal noise of every position, (B, L, D), the same whatever the batch."""
        keys = [[(*parts, "diagnosis") for parts in row] for row in self.keys]
        return model.parametrization.noise(TokenStreams(keys, self.positions.device))

    def block(self, context: Any) -> Block:
        """The positions as something to solve, each in sight of the true tokens that its block may see."""
        return Block(self.positions, self.layout, context, self.keys, self.condition)

    def portions(self, model: DiffusionLM) -> Iterator[Batch]:
        """Batches of fewer positions, where none is denoised together with another; else this one."""
        if model.block_size != 1:
            yield self
            return
        rows, length = self.positions.shape
        for part in pieces(rows, length, model.backbone.vocab_size):
            yield replace(
                self,
                positions=self.positions[:, part],
                valid=self.valid[:, part],
                keys=[row[part] for row in self.keys],
                condition=None if self.condition is None else self.condition[:, part],
            )


def read_rows(source: UnloadedModel, sources: Sequence[Mapping[str, Any]], max_length: int) -> tuple[list[Any], Any]:
    """Rows of data sources, entries of a `data` section, as a model reads them, and what the data was."""
    fields = {"train": list(sources), "max_length": max_length, "drop_unsupervised": True}  # which is told
    section = validated(DataSection, fields, "data")
    prepared = prepare(section, source.tokenizer, classes=source.classes)
    return list(prepared.train), prepared.card["sources"]["train"]


def batches(model: DiffusionLM, rows: Sequence[Mapping[str, Any]], *, seed: int, size: int) -> list[Batch]:
    """Rows as batches; noise is named by a row's tokens and the position."""
    names = request_keys([row["input_ids"] for row in rows])
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
    collate = Collator(pad_id=0, block_size=model.block_size)
    chunks = [order[first : first + size] for first in range(0, len(order), size)]
    return [
        _batch(model, chunk, collate([rows[n] for n in chunk]), [names[n] for n in chunk], seed) for chunk in chunks
    ]


def _batch(
    model: DiffusionLM, rows: list[int], tensors: Mapping[str, Tensor], names: Sequence[str], seed: int
) -> Batch:
    blocks, device = tensors["blocks"], model.device
    slots = [row.nonzero()[:, 0] for row in blocks >= 1]
    width = max(map(len, slots))
    positions = torch.stack([torch.cat([one, one[-1:].expand(width - len(one))]) for one in slots])
    valid = torch.arange(width) < torch.tensor([len(one) for one in slots])[:, None]
    condition = tensors["class_id"][:, None].expand(-1, width).to(device) if model.origin.classes else None
    return Batch(
        rows=rows,
        layout=Layout(tensors["input_ids"].to(device), blocks.to(device)),
        positions=positions.to(device),
        valid=valid.to(device),
        keys=[
            [(seed, name, int(slot), 0) for slot in row] for name, row in zip(names, positions.tolist(), strict=True)
        ],
        condition=condition,
    )
