"""Block diffusion: clean tokens beside noisy copies of some, and who sees whom where an answer grows block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from l2d_framework.types import Context

Keys = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of every layer, (B, heads, S, head size)."""


@dataclass(frozen=True)
class BlockContext(Context):
    """Clean tokens, each of which sees itself and those before it, whoever wrote them.

    A token's keys and values thus depend on the text up to it alone, not on where turns or blocks begin: a conversation
    that is learnt, one read at once as a prompt and one that was extended block by block are the same to the network,
    and a causal language model reads as it was pretrained to. Attention both ways inside blocks of clean tokens has
    none of this, since a prompt does not tell which of its turns were answers. Only noisy tokens look ahead.

    Attributes:
        embedded: embeddings, (B, S, H).
        blocks: number of every slot's block, never falling along a row, (B, S), int64; says which slots are denoised
            together where they are asked about.
        present: where real tokens stand, (B, S), bool.
        keys: keys and values of all slots; None where the network is to read them again, beside the noisy ones.
    """

    embedded: Tensor
    blocks: Tensor
    present: Tensor
    keys: Keys | None = None

    @classmethod
    def of(cls, embedded: Tensor, blocks: Tensor) -> BlockContext:
        """A context that no network has read, from embeddings, (B, S, H), and blocks as in `Layout`."""
        changes = (blocks[:, 1:] != blocks[:, :-1]).cumsum(-1)
        return cls(embedded, functional.pad(changes, (1, 0)), blocks >= 0)

    def longer(self, embedded: Tensor) -> BlockContext:
        """The context with the embeddings, (B, N, H), of further tokens, which the network has not read yet."""
        count = embedded.shape[1]
        blocks = self.after() + torch.arange(count, device=embedded.device)
        return replace(
            self,
            embedded=torch.cat([self.embedded, embedded], 1),
            blocks=torch.cat([self.blocks, blocks], 1),
            present=functional.pad(self.present, (0, count), value=True),
        )

    def after(self) -> Tensor:
        """Number of the block that comes next, (B, 1), int64."""
        return functional.pad(self.blocks + 1, (1, 0))[:, -1:]

    def places(self, slots: Tensor) -> Tensor:
        """How many real tokens stand before each slot, (B, n), inside the context or after it."""
        after = max(0, int(slots.max()) + 1 - self.present.shape[1])
        return (functional.pad(self.present, (0, after), value=True).cumsum(-1) - 1).clamp_min(0).gather(1, slots)

    def seen(self, count: int) -> Tensor:
        """What the last `count` clean tokens see, (B, count, S), bool."""
        return self.present[:, None].expand(-1, count, -1).tril(self.present.shape[1] - count)

    @override
    def select(self, rows: Tensor) -> BlockContext:
        keys = None if self.keys is None else tuple((key[rows], value[rows]) for key, value in self.keys)
        return BlockContext(self.embedded[rows], self.blocks[rows], self.present[rows], keys)


@dataclass(frozen=True)
class Beside:
    """The slots that stand beside the clean tokens: those asked about, and edges.

    Under a label shift the output before a block speaks about its first token, so it has to see the block. The clean
    token there must not, being what later blocks see: a second copy, the edge, is seen by its block in its stead.

    Attributes:
        slots: those asked about, then edges, (B, M), int64.
        blocks: which block each belongs to, (B, M), int64.
        present: False where a slot is listed already and where there is no edge, (B, M), bool.
        reach: the clean tokens before it are seen, (B, M), int64.
        source: which of the M speaks about each position asked about, -1 for none, (B, L), int64.
    """

    slots: Tensor
    blocks: Tensor
    present: Tensor
    reach: Tensor
    source: Tensor

    @classmethod
    def of(cls, context: BlockContext, positions: Tensor, shift: int) -> Beside:
        """Arrange the slots of a query; repeated positions count once, what comes after the clean tokens is one block.

        `shift` is 1 if the output before a position speaks about it, 0 if its own.
        """
        length, (rows, known) = positions.shape[1], context.blocks.shape
        total = max(known, int(positions.max()) + 1)
        numbers = torch.cat([context.blocks, context.after().expand(-1, total - known)], 1)
        blocks = numbers.gather(1, positions)
        start = torch.searchsorted(numbers, blocks)
        order = torch.arange(length, device=positions.device).expand(rows, -1)
        column = positions.new_full((rows, total), -1).scatter(1, positions, order)
        once = column.gather(1, positions) == order
        if not shift:
            return cls(positions, blocks, once, start, column.gather(1, positions))
        # The first of its block that is asked about brings the edge along.
        leader = positions.new_full((rows, total), length).scatter_reduce(1, blocks, order, "amin").gather(1, blocks)
        leads = leader == order
        rank = (leads.cumsum(1) - 1).gather(1, leader)
        chosen = (~leads).long().argsort(dim=1, stable=True)[:, : int(leads.sum(1).max())]
        edges = start.gather(1, chosen) - 1
        has_edge = leads.gather(1, chosen) & (edges >= 0)
        edges = edges.clamp_min(0)
        has_edge &= functional.pad(context.present, (0, total - known)).gather(1, edges)
        source = torch.where(
            positions > start,
            column.gather(1, (positions - 1).clamp_min(0)),
            torch.where(has_edge.gather(1, rank), length + rank, -1),
        )
        return cls(
            torch.cat([positions, edges], 1),
            torch.cat([blocks, blocks.gather(1, chosen)], 1),
            torch.cat([once, has_edge], 1),
            torch.cat([start, start.gather(1, chosen)], 1) - 1,
            source,
        )

    def seen(self, context: BlockContext, *, is_causal: bool) -> Tensor:
        """What the slots see, (B, M, S + M), bool: clean tokens of earlier blocks, then each other within a block."""
        clean = torch.arange(context.present.shape[1], device=self.slots.device)
        before = context.present[:, None] & (clean < self.reach[..., None])
        beside = self.present[:, None] & (self.blocks[:, None] == self.blocks[..., None])
        if is_causal:
            beside &= self.slots[:, None] <= self.slots[..., None]
        return torch.cat([before, beside], -1)


class Reader:
    """A cache that hands every layer keys and values read before, and new ones behind them; keeps both in `made`."""

    def __init__(self, past: Keys | None) -> None:
        self._past, self.made = past, dict[int, tuple[Tensor, Tensor]]()

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Old and new keys and values of a layer, (B, heads, S + n, head size)."""
        if self._past is not None:
            key, value = (
                torch.cat([old, new], -2) for old, new in zip(self._past[layer_idx], (key, value), strict=True)
            )
        self.made[layer_idx] = key, value
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read before."""
        return 0 if self._past is None else self._past[0][0].shape[-2]

    def keys(self) -> Keys:
        """Old and new keys and values of every layer, in order."""
        return tuple(self.made[number] for number in sorted(self.made))
