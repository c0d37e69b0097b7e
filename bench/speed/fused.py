"""What kernels of a GPU save beside the plain way: `python bench/speed/fused.py --device cuda`.

A state of TESS 2 is read with and without its simplex being stored, and the loss of training is taken in one kernel and
in torch's operations. Where there is no kernel both are the plain way, and nothing is saved.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from blocks import measure
from common import check_known, known_device, result_file, write_card
from torch import Tensor, nn

from l2d_framework.cli import run_script
from l2d_framework.diffusion import loss
from l2d_framework.training.run_record import environment
from l2d_plugins.parametrizations.simplex import fused
from l2d_plugins.parametrizations.simplex.space import expected_embedding
from l2d_plugins.parametrizations.simplex.state import WideState

SHAPES = {"7B": (32_000, 4096), "1B": (128_256, 2048), "tiny": (70, 20)}
"""Vocabulary and width."""
POSITIONS = {"7B": (128, 512, 4096), "1B": (128, 512, 4096), "tiny": (3,)}


def reading(size: int, width: int, positions: int, device: torch.device) -> Callable[[], Tensor]:
    """A state in the midst of the reverse process, read as the network's input.

    Args:
        size: of the vocabulary.
        width: of the network.
        positions: of the canvas.
        device: where it lies.

    Returns:
        A function that reads it.
    """
    generator = torch.Generator().manual_seed(0)
    noise = WideState.normal(torch.randint(2**62, (1, positions), generator=generator), size, device)
    tokens = WideState.simplex(torch.randint(size, (1, positions), generator=generator).to(device), 5.0, size)
    x: Any = 0.7 * tokens + 3.5 * noise
    table = torch.randn(size, width, generator=generator).to(device, _dtype(device))
    return torch.no_grad()(lambda: expected_embedding(x, table))


def learning(size: int, width: int, positions: int, device: torch.device) -> Callable[[], Tensor]:
    """Loss and gradient of hidden states under a frozen head.

    Args:
        size: of the vocabulary.
        width: of the network.
        positions: supervised ones.
        device: where they lie.

    Returns:
        A function that computes the gradient.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(positions, width, generator=generator).to(device, _dtype(device)).requires_grad_()
    targets = torch.randint(size, (positions,), generator=generator).to(device)
    head = nn.Linear(width, size, bias=False, device=device, dtype=_dtype(device)).requires_grad_(False)

    def run() -> Tensor:
        total, _ = loss.chunked_cross_entropy(head, features, targets, chunk=1024)
        return torch.autograd.grad(total, features)[0]

    return run


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def plainly(run: Callable[[], Tensor]) -> Tensor:
    """What a function gives without kernels.

    Args:
        run: one of `reading` or `learning`.

    Returns:
        Its result.
    """
    with patch.object(fused, "_has_kernel", return_value=False), patch.object(loss, "_has_kernel", return_value=False):
        return run()


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[str, typer.Option(help="One of `SHAPES`.")] = "7B",
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every case.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Result file; bench/results/fused_DEVICE.json if absent.")] = None,
) -> None:
    """Measure, print, and write the result file."""
    where = known_device(device)
    check_known("--size", [size], SHAPES)
    out = result_file(out, f"fused_{where.type}.json")
    torch.set_num_threads(1)
    found = {}
    for name, case in {"read a state": reading, "loss and gradient": learning}.items():
        for positions in POSITIONS[size]:
            run = case(*SHAPES[size], positions, where)
            cases = {"plain": partial(plainly, run), "kernel": run}
            wanted, got = plainly(run).float(), run().float()
            samples = measure(cases, rounds, where)
            row: dict[str, Any] = {f"{way}_ms": 1e3 * statistics.median(part) for way, part in samples.items()}
            row["times"] = statistics.median(a / b for a, b in zip(*samples.values(), strict=True))
            row["difference"] = float((got - wanted).norm() / wanted.norm())
            found[f"{name}, {positions} positions"] = row | {"samples": samples}
            print(f"{name}, {positions:5} positions", *(f"{key} {value:.3g}" for key, value in row.items()))
    installed = {module: find_spec(module) is not None for module in ("triton", "liger_kernel")}
    settings = {"vocabulary": SHAPES[size][0], "width": SHAPES[size][1], "rounds": rounds, "installed": installed}
    unit = "cpu" if where.type == "cpu" else "wall"
    card = {"device": device, "seconds_are": unit, "settings": settings, **environment(1), "cases": found}
    write_card(out, card)


if __name__ == "__main__":
    run_script(main)
