"""LoRA of the diffusion path: peft's own modules with less work per call."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional

from l2d_plugins.backbones.folding import Folded
from l2d_plugins.backbones.shadow import is_quantized


class LowRank(Linear):
    """peft's adapted linear module, for one adapter that has no dropout and is never switched off.

    peft's own rule for any number and kind of adapters takes longer than the low-rank product itself when a token is
    decoded.
    """

    @property
    def folded(self) -> Folded:
        """Projection and change in one matrix; peft makes these objects, so it comes with the first question."""
        if "_folded" not in self.__dict__:
            self.__dict__["_folded"] = Folded()
        folded: Folded = self.__dict__["_folded"]
        return folded

    def forward(self, x: Tensor) -> Tensor:
        """Frozen projection plus the low-rank change, (..., in) to (..., out)."""
        base, down, up, scale = self._parts()
        if (matrix := self.folded.get(base.weight, down, up)) is not None:
            return functional.linear(x, matrix, base.bias)
        return torch.add(base(x), functional.linear(functional.linear(x, down), up), alpha=scale)

    def _parts(self) -> tuple[Any, Tensor, Tensor, float]:
        (name,) = self.active_adapters
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        return self.base_layer, down.weight, up.weight, self.scaling[name]

    def foldable(self, dtype: torch.dtype) -> list[Tensor]:
        """What is trained, unless the projection is quantized: a matrix would take the memory that has saved."""
        base, down, up, scale = self._parts()
        return [] if is_quantized(base) else [scale * down, up]

    def fold(self, dtype: torch.dtype) -> None:
        """Make one matrix of projection and change, which are not touched."""
        base, down, up, scale = self._parts()
        matrix = torch.addmm(base.weight.float(), up.float(), down.float(), alpha=scale)
        self.folded.set(matrix.to(dtype), base.weight, down, up)


def adapt(layers: nn.Module, config: LoraConfig, name: str) -> None:
    """Put a fresh LoRA of this name on the linear modules that `config` names; it has no dropout."""
    # Of every kind: a quantized module computes in its own way what the low-rank product is added to.
    config._register_custom_module({nn.Module: LowRank})
    inject_adapter_in_model(config, layers, name)
