"""Where and how the weights of a command are loaded."""

from __future__ import annotations

from l2d_framework.errors import ConfigError


def check_dtype(dtype: str | None) -> None:
    """Refuse a type of weights that there is not."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}.")


def check_device(device: str | None) -> str:
    """The device, or for None the GPU where there is one; refused if it cannot be used."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device!r} cannot be used here ({error}). Try cpu, or leave it out.") from error
    return device
