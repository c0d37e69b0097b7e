"""Whether a kernel of the GPU makes expected embeddings without the simplex, and of which states."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from l2d_plugins.parametrizations.simplex.state import WideState


def fused_embedding(x: Tensor, table: Tensor) -> Tensor | None:
    """softmax(x) @ table, (B, L, H), of a state kept as one noise and one token, where a kernel has shown that it can.

    In the type that the product has elsewhere, under autocast, too.

    Args:
        x: states, (B, L, V).
        table: embeddings, (V, H).

    Returns:
        None on other devices, of other states, and where the table is to get a gradient.
    """
    if not isinstance(x, WideState) or not _has_kernel(table) or (table.requires_grad and torch.is_grad_enabled()):
        return None
    if torch.is_autocast_enabled(table.device.type):
        table = table.to(torch.get_autocast_dtype(table.device.type))
    atoms = x.atoms()
    return _launched(atoms, table) if atoms and _is_right(table.device, len(table), table.dtype) else None


def _launched(atoms: tuple[Tensor, ...], table: Tensor) -> Tensor:
    from l2d_plugins.parametrizations.simplex.kernel import expected

    seeds, scales, ids, heights = (values.to(table.device).reshape(-1) for values in atoms)
    with torch.cuda.device_of(table):
        return expected(seeds, scales, ids, heights, table.contiguous()).view(*atoms[0].shape, -1)


def _has_kernel(table: Tensor) -> bool:
    # Shares of a table, or shapes of a dry run, have no memory of their own.
    return table.is_cuda and type(table.data) is Tensor and find_spec("triton") is not None


@cache
def _is_right(device: torch.device, size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel gives what the plain way does of two states, so that a seed means the same text in both.

    Asked once, before its first use: which numbers torch draws depends on its release and on the GPU.
    """
    tokens = WideState.simplex(torch.tensor([[0, size - 1]], device=device), 1.0, size)
    state: Any = tokens + 4 * WideState.normal(torch.tensor([[1, 2**62 + 3]]), size, device)
    # Any two tokens differ, and those that noise chooses are no neighbours.
    table = (torch.arange(size, device=device)[:, None] * torch.arange(1, 17, device=device) % 31 / 31).to(dtype)
    try:
        found, wanted = _launched(state.atoms(), table), state.softmax(-1).to(dtype) @ table
        is_close = torch.allclose(found, wanted, rtol=0, atol=1e-3 if dtype == torch.float32 else 2e-2)
        reason = "" if is_close else "it differs from what torch computes"
    except Exception as error:  # whatever compilers and drivers raise
        reason = f"{type(error).__name__}: {error}"
    if reason:
        what = f"The kernel for states of {size:,} tokens and {dtype} is not used on {device}"
        warnings.warn(f"{what}: {reason}. Answers are the same, and take longer.", UserWarning, stacklevel=2)
    return not reason
