"""Tokens per second of answers in blocks and on a whole canvas: `python bench/speed/blocks.py [--device cuda]`.

The same random weights answer in blocks whose keys and values are kept, in blocks that read all tokens again at every
evaluation (a model of one block per sequence, sampled with a block size), and on the whole canvas; each block takes the
same number of evaluations. Every round measures every case once, so that a busy machine slows all of them alike, and
ratios are medians over rounds. On a CPU, seconds are those of the process, not of the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import known_device, result_file, write_card
from transformers import LlamaConfig, LlamaForCausalLM

from l2d_framework.cli import run_script
from l2d_framework.config import DiffusionRun, parse_run
from l2d_framework.generation.prompts import Encoded, pad_left
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.run_record import environment
from l2d_framework.writing import speed

SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
RUN: dict[str, Any] = {
    "model": {"base": "random"},
    "schedule": {"name": "cosine"},
    "parametrization": {"name": "simplex"},
    "backbone": {"name": "in_place"},
    "sampling": {"preset": "tess2"},
}
WHOLE = "whole canvas"


def models(device: torch.device, sizes: list[int]) -> dict[str, tuple[DiffusionLM, int | None]]:
    """Models that share their weights, with the block size to sample at.

    Args:
        device: where to run; in bfloat16 on a GPU.
        sizes: block sizes.

    Returns:
        Model and `block_size` of the request, by case; the whole canvas first.
    """
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    lm = lm.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)  # type: ignore[arg-type]

    def model(block_size: int | None) -> DiffusionLM:
        torch.manual_seed(1)
        run = parse_run({**RUN, "block_size": block_size})
        assert isinstance(run, DiffusionRun)
        backbone = run.backbone.build(lm)
        space = run.parametrization.build(backbone.vocab_size, backbone.hidden_size)
        return DiffusionLM(run.schedule.build(), space, backbone, block_size).to(device).eval()

    whole = model(None)
    found: dict[str, tuple[DiffusionLM, int | None]] = {WHOLE: (whole, None)}
    for size in sizes:
        found[f"blocks of {size}"] = model(size), None
        found[f"blocks of {size}, read again"] = whole, size
    return found


def seconds(device: torch.device) -> float:
    """Seconds of the process on a CPU, else of the clock once the device has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def answer(model: DiffusionLM, block_size: int | None, prompts: Encoded, *, length: int, steps: int) -> None:
    """Generate one batch.

    Args:
        model: the model.
        block_size: of the request.
        prompts: the batch.
        length: new tokens.
        steps: evaluations of each block.
    """
    options = {} if block_size is None else {"block_size": block_size}
    found = model.generate(
        prompts, max_new_tokens=length, min_new_tokens=length, num_inference_steps=steps, eos_token_id=None, **options
    )
    assert found.answers.shape[1] == length


def measure(cases: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every case, taken in turns after one round that does not count.

    Args:
        cases: what to measure.
        rounds: samples of each.
        device: where they run.

    Returns:
        `rounds` numbers by case.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, run in cases.items():
            start = seconds(device)
            run()
            if number:
                found[name].append(seconds(device) - start)
    return found


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=5, help="Samples of every case.")] = 5,
    length: Annotated[int, typer.Option(min=1, help="New tokens.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Evaluations of each block.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Prompts, of 32 tokens.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Result file; bench/results/blocks_DEVICE.json if absent.")] = None,
) -> None:
    """Measure, print a table, and write the result file."""
    where = known_device(device)
    out = result_file(out, f"blocks_{where.type}.json")
    torch.set_num_threads(1)
    sizes = [16, 4]
    prompts = pad_left([list(range(5 + row, 37 + row)) for row in range(batch)])
    cases: dict[str, Callable[[], None]] = {
        name: partial(answer, model, size, prompts, length=length, steps=steps)
        for name, (model, size) in models(where, sizes).items()
    }
    samples = measure(cases, rounds, where)
    rows = {
        name: {
            "tokens_per_second": batch * length / statistics.median(found),
            "speed": statistics.median(w / s for w, s in zip(samples[WHOLE], found, strict=True)),
            "seconds": found,
        }
        for name, found in samples.items()
    }
    for name, row in rows.items():
        print(f"{name:28} {speed(row['tokens_per_second']):>19} {row['speed']:8.2f} x the {WHOLE}")
    settings = {"model": SHAPE, "run": RUN, "length": length, "steps": steps, "batch": batch, "rounds": rounds}
    unit = "cpu" if where.type == "cpu" else "wall"
    card = {"device": device, "seconds_are": unit, "settings": settings, **environment(1), "cases": rows}
    write_card(out, card)


if __name__ == "__main__":
    run_script(main)
