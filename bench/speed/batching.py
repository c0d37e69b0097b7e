"""What answers of unlike lengths and several answers of one prompt cost: `python bench/speed/batching.py`.

Prompts whose answers have 10 to 200 tokens are answered eight at a time: in batches that run until their longest
answer has ended, and with waiting prompts that take the places of answers that have ended (`batch_size`). Both are
compared with batches whose answers end together. Beside it, ten answers of one prompt at once and in ten calls. Every
round measures every case once, so that a busy machine slows all of them alike, and ratios are medians over rounds. On
a CPU, seconds are those of the process, not of the clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from blocks import SHAPE, measure
from common import known_device, result_file
from l2d import RUN, l2d_over, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from l2d_framework.cli import run_script
from l2d_framework.generation.prompts import pad_left
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.run_record import environment

SHORTEST, LONGEST = 10, 200
WIDTH = 32
EQUAL, WHOLE, QUEUE = "answers of equal lengths", "whole batches", "waiting prompts join"
TOGETHER, APART = "ten answers at once", "ten calls"


class Wanted(StoppingCriteria):
    """Ends an answer at the length that is the first token of its prompt."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows are done, (B,), bool."""
        return input_ids.shape[1] - self.width >= input_ids[:, 0]


def prompts(lengths: list[int], width: int) -> list[list[int]]:
    """A prompt for each length of an answer.

    Args:
        lengths: of the answers, tokens.
        width: of every prompt, tokens.

    Returns:
        Token ids.
    """
    generator = torch.Generator().manual_seed(0)
    return [[n, *torch.randint(300, 500, (width - 1,), generator=generator).tolist()] for n in lengths]


def answer(model: DiffusionLM, batch: list[list[int]], **options: Any) -> int:
    """Answer some prompts with as many tokens as each of them wants.

    Args:
        model: the model.
        batch: what `prompts` returned.
        **options: of `generate`.

    Returns:
        Tokens of all answers.
    """
    found = model.generate(
        pad_left(batch, options.pop("keys", None)),
        max_new_tokens=max(row[0] for row in batch),
        eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([Wanted(len(batch[0]))]),
        **options,
    )
    return int(found.lengths.sum())


def mixed(model: DiffusionLM, lengths: list[int], batch: int, steps: int) -> dict[str, Callable[[], int]]:
    """Answers of unlike lengths: each case makes about as many tokens and says how many.

    Args:
        model: the model.
        lengths: of the answers, tokens.
        batch: answers at a time.
        steps: evaluations per token.

    Returns:
        Cases by name, the ideal first.
    """
    mean = round(statistics.mean(lengths))
    starts = range(0, len(lengths), batch)

    def in_batches(each: list[list[int]]) -> int:
        return sum(answer(model, each[start : start + batch], num_inference_steps=steps) for start in starts)

    return {
        EQUAL: partial(in_batches, prompts([mean] * len(lengths), WIDTH)),
        WHOLE: partial(in_batches, prompts(lengths, WIDTH)),
        QUEUE: partial(answer, model, prompts(lengths, WIDTH), num_inference_steps=steps, batch_size=batch),
    }


def several(model: DiffusionLM, length: int, width: int, steps: int) -> dict[str, Callable[[], int]]:
    """Ten answers of one prompt.

    Args:
        model: the model.
        length: of each answer, tokens.
        width: of the prompt, tokens.
        steps: evaluations per token.

    Returns:
        Cases by name.
    """
    batch = prompts([length], width)

    def in_calls() -> int:
        return sum(answer(model, batch, keys=[str(number)], num_inference_steps=steps) for number in range(10))

    return {
        TOGETHER: partial(answer, model, batch, num_return_sequences=10, num_inference_steps=steps),
        APART: in_calls,
    }


def compare(cases: dict[str, Callable[[], int]], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds per token of every case.

    Args:
        cases: what to measure, each returning its number of tokens.
        rounds: samples of each.
        device: where they run.

    Returns:
        By case the median of its seconds per token, its cost in multiples of the first case, and all seconds.
    """
    tokens: dict[str, int] = {}

    def counted(name: str, case: Callable[[], int]) -> None:
        tokens[name] = case()

    samples = measure({name: partial(counted, name, case) for name, case in cases.items()}, rounds, device)
    each = {name: [second / tokens[name] for second in seconds] for name, seconds in samples.items()}
    first = next(iter(each.values()))
    return {
        name: {
            "seconds_per_token": statistics.median(found),
            "cost": statistics.median(a / b for a, b in zip(found, first, strict=True)),
            "tokens": tokens[name],
            "seconds": samples[name],
        }
        for name, found in each.items()
    }


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every case.")] = 3,
    count: Annotated[int, typer.Option(min=1, help="Prompts of unlike answers.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Evaluations per token.")] = 5,
    width: Annotated[int, typer.Option(min=1, help="Tokens of the prompt with ten answers.")] = 512,
    out: Annotated[Path | None, typer.Option(help="Result file; bench/results/batching_DEVICE.json if absent.")] = None,
) -> None:
    """Measure, print a table, and write the result file."""
    where = known_device(device)
    out = result_file(out, f"batching_{where.type}.json")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lm: Any = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = l2d_over(lm.to(where, dtype), dtype).eval()
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    groups = {
        "unlike lengths": compare(mixed(model, lengths, batch, steps), rounds, where),
        "ten answers of one prompt": compare(several(model, 20, width, steps), rounds, where),
    }
    for group, rows in groups.items():
        for name, row in rows.items():
            print(f"{group:28} {name:28} {1e3 * row['seconds_per_token']:10.2f} ms per token {row['cost']:8.2f}")
    settings = {"model": SHAPE, "run": RUN, "lengths": lengths, "batch": batch, "steps": steps, "width": width}
    unit = "cpu" if where.type == "cpu" else "wall"
    card = {"device": device, "seconds_are": unit, "settings": settings, **environment(1), "groups": groups}
    write(out, card)


if __name__ == "__main__":
    run_script(main)
