"""Embeddings expected under states kept as tokens and seeds, whose numbers never leave the registers of a GPU.

The softmax over the vocabulary goes along as in flash attention (arXiv:2205.14135). Noise is that of torch's `normal_`
on CUDA from the same seed: place i of a tensor with no more places than the GPU runs threads is the first normal number
of Philox's subsequence i (`distribution_elementwise_grid_stride_kernel` of ATen, and `curand_normal4`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _PLACES, _COLUMNS = 32, 32, 256


def expected(seeds: Tensor, scales: Tensor, ids: Tensor, heights: Tensor, table: Tensor) -> Tensor:
    """Embeddings expected under the softmax of `scales` times seeded noise plus `heights` at tokens.

    Args:
        seeds: of the noise, (N,), int64.
        scales: (N,), float32.
        ids: tokens, (N,), int64.
        heights: (N,), float32.
        table: embeddings, (V, H), each in one piece.

    Returns:
        (N, H), in the type of `table`.
    """
    count, (size, width) = len(seeds), table.shape
    out = table.new_empty(count, width)
    _expected[(triton.cdiv(count, _ROWS), triton.cdiv(width, _COLUMNS))](
        seeds,
        scales,
        ids,
        heights,
        table,
        out,
        count,
        size,
        width,
        table.stride(0),
        PRECISION="ieee" if table.dtype == torch.float32 else "tf32",
        ROWS=_ROWS,
        PLACES=_PLACES,
        COLUMNS=_COLUMNS,
        num_warps=8,
    )
    return out


@triton.jit
def _normal(seed, place):  # type: ignore[no-untyped-def]
    zero = place * 0
    radius, angle, _, _ = tl.philox(seed, zero, zero, place, zero)
    inverse = 2.3283064e-10  # 2**-32
    around = 1.46291807e-09  # 2 pi 2**-32
    length = tl.sqrt(-2.0 * tl.log(radius.to(tl.float32) * inverse + inverse / 2))
    return length * tl.sin(angle.to(tl.float32) * around + around / 2)


@triton.jit  # type: ignore[untyped-decorator]
def _expected(  # type: ignore[no-untyped-def]
    seeds,
    scales,
    ids,
    heights,
    table,
    out,
    count,
    size,
    width,
    stride,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < count, column < width
    seed = tl.load(seeds + row, mask=is_row, other=0)[:, None]
    scale = tl.load(scales + row, mask=is_row, other=0.0)[:, None]
    token = tl.load(ids + row, mask=is_row, other=0)[:, None]
    height = tl.load(heights + row, mask=is_row, other=0.0)[:, None]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, PLACES):
        place = start + tl.arange(0, PLACES)
        x = scale * _normal(seed, place[None, :]) + tl.where(place[None, :] == token, height, 0.0)
        x = tl.where(place[None, :] < size, x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 1))
        shrink = tl.exp(top - new)
        mass = tl.exp(x - new[:, None])
        total = total * shrink + tl.sum(mass, 1)
        places = table + place[:, None].to(tl.int64) * stride + column[None, :]
        values = tl.load(places, mask=(place[:, None] < size) & is_column[None, :], other=0.0)
        sums = sums * shrink[:, None] + tl.dot(mass.to(values.dtype), values, input_precision=PRECISION)
        top = new
    found = out + row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(found, sums / total[:, None], mask=is_row[:, None] & is_column[None, :])
