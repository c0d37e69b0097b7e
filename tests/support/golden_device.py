"""On which device golden cases are computed: the CPU, or what L2D_GOLDEN_DEVICE names, such as cuda."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

DEVICE = torch.device(os.environ.get("L2D_GOLDEN_DEVICE") or "cpu")


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a file, on the device."""
    return load_file(path, device=str(DEVICE))
