"""What training holds on each GPU, for models of 1B, 8B and 70B parameters: `python bench/speed/sizes.py`.

The dry run's estimate for the shapes of Llama 3.2 1B and Llama 3.1 8B and 70B, without their weights: rows of 2,048
tokens, half of them supervised, one row at a time, activations computed again, bfloat16 by autocast, trained weights in
float32, Adam. One GPU divides nothing; 8 and 64 divide weights, gradients and the optimizer's state (FSDP, ZeRO 3).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import result_file, write_card
from transformers import LlamaConfig

from l2d_framework.cli import run_script
from l2d_framework.config import DiffusionRun, parse_run
from l2d_framework.evaluation.tables import markdown
from l2d_framework.training.data.collate import Collator
from l2d_framework.training.dry_run import trial_of
from l2d_framework.training.memory import Memory, Shard
from l2d_framework.training.run_record import environment
from l2d_framework.writing import write_whole

LLAMA: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Of Llama 3.2 1B, Llama 3.1 8B and Llama 3.1 70B, from their config.json on the hub."""
METHODS: dict[str, dict[str, Any]] = {
    "L2D, LoRA": {"method": "l2d"},
    "L2D, full": {"method": "l2d", "backbone": {"variant": "full"}},
    "TESS, full": {"method": "tess"},
}
GPUS, ROOM = (1, 8, 64), 80 * 10**9
"""How many, and bytes on each."""
TRAINING = {"batch_size": 128, "micro_batch_size": 1, "bf16": True, "gradient_checkpointing": True}
COLUMNS = ("frozen", "trained", "gradients", "optimizer", "gathered", "activations", "vocabulary", "peak")


def estimate(shape: dict[str, Any], method: dict[str, Any], length: int) -> dict[int, Memory]:
    """What one GPU of each number holds.

    Args:
        shape: of the language model.
        method: fields of the run.
        length: tokens of a row.

    Returns:
        Memory by the number of GPUs.
    """
    run = parse_run({**method, "model": {"base": "shapes"}, "training": TRAINING})
    assert isinstance(run, DiffusionRun)
    config = LlamaConfig(**shape, dtype=torch.bfloat16)
    trial = trial_of(run, config)
    known = length // 2
    row = {"input_ids": [0] * length, "supervised": [False] * known + [True] * (length - known)}
    batch = Collator(0, run.block_size)([{**row, "class_id": -1, "index": 0, "epoch": 0}])
    # An update has more rows than there are GPUs, so gradients of earlier micro-batches are there already.
    shards: dict[int, Shard] = {gpus: "none" if gpus == 1 else "full" for gpus in GPUS}
    traces = {shard: trial.trace(batch, accumulates=True, shard=shard) for shard in dict.fromkeys(shards.values())}
    return {gpus: trial.memory(traces[shard], devices=gpus, shard=shard) for gpus, shard in shards.items()}


def table(models: dict[str, dict[str, dict[str, dict[str, int]]]]) -> list[str]:
    """A table in Markdown, in GB (10^9 bytes) on each GPU.

    Args:
        models: bytes by model, method, number of GPUs and part.

    Returns:
        Its lines.
    """
    rows = [["model", "", "GPUs", *COLUMNS, "fits in 80 GB"]]
    for model, methods in models.items():
        for method, numbers in methods.items():
            for gpus, parts in numbers.items():
                cells = [f"{parts[column] / 1e9:,.1f}" for column in COLUMNS]
                rows.append([model, method, gpus, *cells, "yes" if parts["peak"] <= ROOM else "no"])
    return markdown(rows)


def main(
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 2048,
    out: Annotated[Path | None, typer.Option(help="Result file; bench/results/sizes.json if absent.")] = None,
) -> None:
    """Estimate, print a table, and write it and the result file."""
    out = result_file(out, "sizes.json")
    torch.set_num_threads(1)
    models: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for model, shape in SHAPES.items():
        models[model] = {}
        for name, method in METHODS.items():
            found = estimate(shape, method, length)
            models[model][name] = {str(gpus): asdict(memory) for gpus, memory in found.items()}
            print("\n".join(table({model: {name: models[model][name]}})[2:]), flush=True)
    settings = {"length": length, "shapes": SHAPES, "methods": METHODS, "training": TRAINING, "room": ROOM}
    write_card(out, {"settings": settings, **environment(1), "models": models})
    heading = "What training holds on each GPU, in GB (10^9 bytes), as the dry run estimates it: `speed/sizes.py`.\n"
    write_whole(out.with_suffix(".md"), "\n".join([heading, *table(models)]) + "\n")


if __name__ == "__main__":
    run_script(main)
