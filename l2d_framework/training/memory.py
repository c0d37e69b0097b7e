"""What training holds in memory, per device, from shapes alone: no weight is loaded and nothing is multiplied.

Forward and backward pass of the very module that is trained are run on shapes (`Watch`), and what is held is added up
over time. Beside that stand the weights, their gradients and the optimizer's state, divided among devices as FSDP does.

Source: PyTorch FSDP, arXiv:2304.11277; ZeRO, arXiv:1910.02054, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from l2d_framework.training.shapes import Watch, to_shapes

Shard = Literal["none", "gradients", "full"]
SHARDS: tuple[Shard, ...] = get_args(Shard)
"""What devices divide among them: nothing (`ddp.yaml`); gradients and optimizer states, and weights between updates
(`fsdp2_keep.yaml`, ZeRO 2); or weights while they are not used, too (`fsdp2.yaml`, ZeRO 3)."""

_UNIT = re.compile(r"^.*?\.(\d+)\.")


@dataclass(frozen=True)
class Part:
    """Parameters of one part of a model, the layers of a stack taken together.

    Attributes:
        total: how many there are.
        trained: how many are trained.
        size: their bytes.
    """

    total: int
    trained: int
    size: int


@dataclass(frozen=True)
class Trace:
    """What one forward and backward pass holds.

    Attributes:
        held: bytes after every operation, by the fields of `Held`, (n, 5).
        kept: bytes that the forward pass leaves for the backward pass, in proportion to rows.
        copied: bytes of copies of weights that it leaves, too.
    """

    held: npt.NDArray[np.int64]
    kept: int
    copied: int

    def times(self, factor: float) -> Trace:
        """What so many times the rows hold, where neither gradients nor pieces of the vocabulary grow with them."""
        if factor == 1:
            return self
        held = self.held.copy()
        others, wide = held[:, 3], held[:, 4]
        held[:, 3] = (factor * (others - wide)).astype(np.int64) + wide
        return Trace(held, round(factor * self.kept), self.copied)

    @property
    def vocabulary(self) -> int:
        """Most bytes at a time of what is as wide as the vocabulary."""
        return int(self.held[:, 4].max())


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        frozen: weights that are not trained, and buffers.
        trained: weights that are trained, in float32.
        gradients: of all that is trained, after a backward pass; with the buckets that engines send them in.
        optimizer: its state.
        gathered: weights of other devices that are here for the moment.
        activations: what the forward pass leaves for the backward pass, copies of weights by autocast among it.
        vocabulary: most at a time of what is as wide as the vocabulary.
        peak: the most at any time. Less than the sum of all, since gradients appear while activations go.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    vocabulary: int
    peak: int


class Trial:
    """A model whose training is tried on shapes.

    Args:
        model: what is trained, on the meta device, in training mode; its parameters are turned into shapes.
        loss: makes the loss of a batch with it.
        vocab_size: tokens.
        bf16: compute in bfloat16 by autocast.
        fused: update all weights in one kernel, without temporary tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[dict[str, Tensor]], Tensor],
        *,
        vocab_size: int,
        bf16: bool = False,
        fused: bool = False,
    ) -> None:
        self._device = torch.device("cpu")
        to_shapes(model, self._device)
        self._parameters = dict(model.named_parameters())
        self._buffers = list(model.buffers())
        self._loss, self._vocab_size, self._bf16 = loss, vocab_size, bf16
        self._state, self._temporary = self._update(fused)

    def parts(self) -> dict[str, Part]:
        """Parameters by the part of the model they are in, in its order."""
        parts: dict[str, Part] = {}
        for name, p in self._parameters.items():
            numbered = _UNIT.match(name)
            where = f"{name[: numbered.start(1)]}*" if numbered else name.rpartition(".")[0]
            before = parts.get(where, Part(0, 0, 0))
            trained = p.numel() if p.requires_grad else 0
            parts[where] = Part(before.total + p.numel(), before.trained + trained, before.size + _bytes(p))
        return parts

    def trace(self, batch: Mapping[str, Tensor], *, accumulates: bool, shard: Shard = "none") -> Trace:
        """What a forward and backward pass of a micro-batch holds.

        Args:
            batch: the micro-batch.
            accumulates: whether there are gradients of earlier ones.
            shard: what devices divide; if anything, autocast copies weights anew whenever it needs them.

        Returns:
            What is held.
        """
        watch = self._watch()
        try:
            with watch:
                for p in self._trained() if accumulates else ():
                    p.grad = torch.empty_like(p)
                    watch._is_gradient(p)
                caches = shard == "none"
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=caches):
                    loss = self._loss(dict(batch))
                before = watch.now
                loss.backward()
            return Trace(np.array(watch.moments, np.int64), before.others, before.copies)
        finally:
            watch.close()
            for p in self._trained():
                p.grad = None

    def memory(self, trace: Trace, *, devices: int = 1, shard: Shard = "none") -> Memory:
        """Bytes on each of some devices, which must share rows of a batch so that each has those of the trace.

        Trained weights are kept in float32, in which they are updated. FSDP gathers weights as they are kept: the
        parameters outside any stack of layers for the whole pass, and of the others all, or two layers at a time; what
        autocast copies of them for the backward pass stays whole on every device. DDP keeps as many bytes in buckets as
        there are gradients.

        Args:
            trace: of a micro-batch.
            devices: how many.
            shard: what they divide among them.

        Returns:
            What one of them holds.
        """
        shard = "none" if devices == 1 else shard
        trained = [p for p in self._parameters.values() if p.requires_grad]
        weights = sum(map(_bytes, trained))
        frozen = sum(_bytes(p) for p in self._parameters.values() if not p.requires_grad)
        buffers = sum(map(_bytes, self._buffers))
        parts = 1 if shard == "none" else devices
        gathered, sending = 0, weights if devices > 1 else 0
        if shard != "none":
            gathered = self._gathered() if shard == "full" else weights + frozen
            sending = self._largest_gradient()
        # Copies and what is computed are whole, gradients in shares.
        rates = np.array([1 / parts, 1.0, 1.0, 1.0, 0.0])
        gradients, state = weights // parts, self._state // parts
        resident = frozen // parts + buffers + weights // parts + state
        passing = resident + gathered + sending + int((trace.held @ rates).max())
        updating = resident + gradients + sending + self._temporary // parts
        return Memory(
            frozen=frozen // parts + buffers,
            trained=weights // parts,
            gradients=gradients + sending,
            optimizer=state,
            gathered=gathered,
            activations=trace.kept + trace.copied,
            vocabulary=trace.vocabulary,
            peak=max(passing, updating),
        )

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._parameters.values() if p.requires_grad]

    def _watch(self) -> Watch:
        return Watch(self._parameters.values(), self._buffers, self._vocab_size)

    def _update(self, fused: bool) -> tuple[int, int]:
        """Bytes of the optimizer's state, and the most that an update takes beside it."""
        for p in self._trained():
            p.grad = Tensor.detach(torch.empty_like(p))
        gradients = [p.grad for p in self._trained()]
        watch = Watch([*self._parameters.values(), *gradients], self._buffers, self._vocab_size)  # type: ignore[list-item]
        watch.close()
        with watch:
            optimizer = AdamW(self._trained(), foreach=False)
            optimizer.step()
        state = sum(_bytes(x) for of in optimizer.state.values() for x in of.values())
        for p in self._trained():
            p.grad = None
        most = max(now.copies + now.ahead + now.others for now in watch.moments)
        return state, 0 if fused else max(most - state, 0)

    def _units(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that are gathered together: layers of one number, in whatever stack, and under "" all others."""
        units: dict[str, list[nn.Parameter]] = {"": []}
        for name, p in self._parameters.items():
            numbered = _UNIT.match(name)
            units.setdefault(numbered[1] if numbered else "", []).append(p)
        return units

    def _gathered(self) -> int:
        sizes = {name: sum(map(_bytes, unit)) for name, unit in self._units().items()}
        rest = sizes.pop("")
        return rest + sum(sorted(sizes.values())[-2:])

    def _largest_gradient(self) -> int:
        return max(sum(_bytes(p) for p in unit if p.requires_grad) for unit in self._units().values())


def _bytes(x: Any) -> int:
    return int(x.numel() * x.element_size())
