"""LoRA of the diffusion path: peft's own modules with less work per call."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional


class LowRank(Linear):
    """peft's adapted linear module, for one adapter that has no dropout and is never switched off.

    peft's own rule for any number and kind of adapters takes longer than the low-rank product itself when a token is
    decoded.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Frozen projection plus the low-rank change."""
        (name,) = self.active_adapters
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        change = functional.linear(functional.linear(x, down.weight), up.weight)
        return torch.add(self.base_layer(x), change, alpha=self.scaling[name])


def adapt(layers: nn.Module, config: LoraConfig, name: str) -> None:
    """Put a fresh LoRA without dropout on the linear modules that the config names, in place."""
    # Of every kind: a quantized module computes in its own way what the low-rank product is added to.
    config._register_custom_module({nn.Module: LowRank})
    inject_adapter_in_model(config, layers, name)
