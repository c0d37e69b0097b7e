"""What the random numbers of a token cost: `python bench/speed/noise.py [--device cuda]`.

On the host each stream of a token is a generator of numpy. Beside it stands the same Philox in integer tensors on the
device, for all rows at once: the same integers, and so the same uniform numbers, and normal ones by Box and Muller
where numpy's ziggurat has others. It is replayed from a graph on a GPU. Both end on the device. On a CPU, seconds are
those of the process, not of the clock.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from blocks import measure
from common import known_device, result_file, write_card
from overhead import repeated
from torch import Tensor

from l2d_framework.cli import run_script
from l2d_framework.diffusion.rng import TokenStreams, stream_key
from l2d_framework.generation.replay import CudaGraph
from l2d_framework.training.run_record import environment

ROWS, SIZES, EVALUATIONS = (1, 8, 32, 128), (256, 2048), 15
GOALS = {1: 20.0, 32: 30.0}
"""Milliseconds a token is to take on a GPU, by rows."""
_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)


def _high(words: Tensor) -> Tensor:
    return (words >> 32) & _LOW


def _product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Both halves of a product of unsigned words, out of products of halves."""
    low, high = words & _LOW, _high(words)
    cross = high * (factor & _LOW) + _high(low * (factor & _LOW))
    other = low * (factor >> 32) + (cross & _LOW)
    return high * (factor >> 32) + _high(cross) + _high(other), words * _signed(factor)


def philox(keys: Tensor, count: int) -> Tensor:
    """The first 4 x `count` words of streams with keys (B, 2), (B, 4 x count), all int64.

    Source: Salmon et al. 2011, Philox4x64-10.
    """
    words = [torch.arange(1, count + 1, device=keys.device).expand(len(keys), -1)]
    words += [torch.zeros_like(words[0])] * 3
    for step in range(10):
        (high, low), (other, lower) = (_product(words[i], _MULTIPLIERS[i // 2]) for i in (0, 2))
        first, second = (keys[:, i, None] + _signed(step * _WEYL[i] % 2**64) for i in (0, 1))
        words = [other ^ words[1] ^ first, lower, high ^ words[3] ^ second, low]
    return torch.stack(words, -1).flatten(1)


def uniform(keys: Tensor, count: int) -> Tensor:
    """The first numbers in [0, 1) of streams, (B, count), float32: those of numpy."""
    words = philox(keys, -(-count // 8))
    return (torch.stack([words & _LOW, _high(words)], -1).flatten(1)[:, :count] >> 8).float() * 2**-24


def normal(keys: Tensor, size: int) -> Tensor:
    """Normal numbers by Box and Muller, (B, size), float32."""
    radius, angle = uniform(keys, 2 * -(-size // 2)).chunk(2, 1)
    radius, angle = (-2 * (1 - radius).log()).sqrt(), 2 * math.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :size]


def host(rows: int, size: int, device: torch.device) -> None:
    """The prior, the numbers of the estimates, and the one by which the token is picked, as sampling draws them.

    Args:
        rows: answers at a time.
        size: of the state.
        device: where they are wanted.
    """
    prior, estimate, token = (TokenStreams(_named(rows, purpose), device) for purpose in ("prior", "estimate", "token"))
    prior.normal(size)
    for _ in range(EVALUATIONS):
        estimate.uniform()
    token.uniform()


def on_device(rows: int, size: int, device: torch.device) -> Callable[[], None]:
    """The same numbers of all rows at once.

    Args:
        rows: answers at a time.
        size: of the state.
        device: where they are made.

    Returns:
        A function that makes them.
    """
    keys = torch.empty(3, rows, 2, dtype=torch.int64, device=device)
    graph: Any = CudaGraph(device) if device.type == "cuda" else lambda work: work()

    def draw() -> tuple[Tensor, Tensor]:
        return normal(keys[0], size), uniform(keys[1:].flatten(0, 1), EVALUATIONS)

    def run() -> None:
        named = [key for purpose in ("prior", "estimate", "token") for row in _named(rows, purpose) for key in row]
        words = np.frombuffer(b"".join(stream_key(*parts) for parts in named), "<i8")
        keys.copy_(torch.from_numpy(words.copy()).view_as(keys))
        graph(draw)

    return run


def _named(rows: int, purpose: str) -> list[list[tuple[int | str, ...]]]:
    return [[(0, f"{row:032x}.0", 128, 0, purpose)] for row in range(rows)]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every case.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Result file; bench/results/noise_DEVICE.json if absent.")] = None,
) -> None:
    """Measure, print a table, and write the result file."""
    where = known_device(device)
    out = result_file(out, f"noise_{where.type}.json")
    torch.set_num_threads(1)
    found = {}
    for size in SIZES:
        for rows in ROWS:
            times = max(2, 64 // rows)
            cases = {"host": partial(host, rows, size, where), "device": on_device(rows, size, where)}
            samples = measure({name: repeated(case, times) for name, case in cases.items()}, rounds, where)
            spent = {name: [1e3 * second / times for second in part] for name, part in samples.items()}
            row: dict[str, Any] = {f"{name}_ms": statistics.median(part) for name, part in spent.items()}
            row["ratio"] = statistics.median(a / b for a, b in zip(spent["device"], spent["host"], strict=True))
            row["share_of_goal"] = row["host_ms"] / GOALS[rows] if rows in GOALS else None
            found[f"D {size}, batch {rows}"] = row | {"samples": spent}
            print(f"D {size:5} batch {rows:4}", *(f"{name} {value:.3f}" for name, value in row.items() if value))
    settings = {"evaluations": EVALUATIONS, "goals_ms": GOALS, "rounds": rounds}
    unit = "cpu" if where.type == "cpu" else "wall"
    card = {"device": device, "seconds_are": unit, "settings": settings, **environment(1), "cases": found}
    write_card(out, card)


if __name__ == "__main__":
    run_script(main)
