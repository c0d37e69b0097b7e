"""Whether `l2d train --dry-run` knows what training holds: `python bench/speed/memory.py [--model FOLDER]`.

Two updates of every kind of run, with rows of one length, beside what the dry run says of them. Measured is what the
allocator of torch gives and takes back while they are made, by the profiler's events of memory, and the weights that
were there before: neither libraries nor an allocator's habits are in it, what kernels take for a moment is. Resident
memory would hold both of the former, and moves by hundreds of MiB at these sizes.

Each case runs in a process of its own on one thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import check_known, known_model, result_file, write_card
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from l2d_framework.cli import run_script
from l2d_framework.config import RewardRun, parse_run
from l2d_framework.errors import L2DError
from l2d_framework.training.dry_run import Machine, dry_run
from l2d_framework.training.run import train_runs
from l2d_framework.training.run_record import environment
from l2d_framework.training.tokenizer import train_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 16_384,
    "hidden_size": 320,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
L2D: dict[str, Any] = {"method": "l2d"}
TESS: dict[str, Any] = {"method": "tess"}
FULL: dict[str, Any] = {**L2D, "backbone": {"variant": "full"}}
LM: dict[str, Any] = {"kind": "language_model"}
RECOMPUTING: dict[str, Any] = {"training": {"gradient_checkpointing": True}}
CASES: dict[str, dict[str, Any]] = {
    "L2D, LoRA": L2D,
    "L2D, full": FULL,
    "TESS, full": TESS,
    "language model, LoRA": {**LM, "lora": {}},
    "language model, full": LM,
    "reward": {"kind": "reward"},
    "L2D, LoRA, recomputing": {**L2D, **RECOMPUTING},
    "TESS, full, recomputing": {**TESS, **RECOMPUTING},
    "reward, recomputing": {"kind": "reward", **RECOMPUTING},
    "L2D, LoRA, bfloat16": {**L2D, "training": {"bf16": True}},
    "TESS, full, bfloat16": {**TESS, "training": {"bf16": True}},
    "TESS, full, four micro-batches": {**TESS, "training": {"micro_batch_size": 2}},
}
LIMIT = 0.15
"""How far an estimate may be off."""


class AllocatedPeak(TrainerCallback):
    """Measures the most bytes of tensors at a time while a trainer trains."""

    peak = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Count the weights and begin to listen."""
        held = [*model.parameters(), *model.buffers()]
        self._weights = sum(x.numel() * x.element_size() for x in held)
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add up what was given and taken back, after the last update."""
        if state.global_step < state.max_steps:
            return
        self._profile.stop()
        results: Any = self._profile.profiler
        events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
        now = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.peak = max(self.peak, self._weights + now)


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """Save a random language model and its tokenizer.

    Args:
        folder: where to.
        shape: of the model.
    """
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    train_tokenizer(["one two three four five six"] * 4, 300).save_pretrained(folder)


def run_of(case: dict[str, Any], model: Path, folder: Path, rows: int, length: int) -> dict[str, Any]:
    """Fields of a run of two updates on rows of one length, whose data it writes.

    Args:
        case: its own fields.
        model: folder of the language model.
        folder: for data and output.
        rows: of an update.
        length: tokens of each.

    Returns:
        The fields.
    """
    is_reward = case.get("kind") == "reward"
    answers: dict[str, Any] = {"completion": "six five " * length}
    if is_reward:
        # Texts that are too long are left out, so these just fit, and all are padded.
        answers = {"chosen": "six " * (length // 8), "rejected": "five " * (length // 8)}
    data = folder / "data.jsonl"
    data.write_text(f"{json.dumps({'prompt': 'one two three', **answers})}\n" * 2 * rows, encoding="utf-8")
    section: dict[str, Any] = {"train": [{"path": str(data)}], "max_length": length}
    if is_reward:
        section |= {"pad_to": length, "add_pad_token": True}
    training = {"max_steps": 2, "batch_size": rows // 2 if is_reward else rows, **case.get("training", {})}
    fields = {"model": {"base": str(model)}, "data": section, "output_dir": str(folder / "out")}
    return {**case, **fields, "training": training}


def compare(fields: dict[str, Any]) -> dict[str, Any]:
    """Estimate and train a run.

    Args:
        fields: of the run file.

    Returns:
        The dry run's case, its `peak` among it, and the `measured` one, in bytes.
    """
    run = parse_run(fields)
    planned = dry_run([run], Machine())[0]
    recomputes = run.training.gradient_checkpointing
    found = next(case for case in planned["memory"]["cases"] if case["gradient_checkpointing"] == recomputes)
    measure = AllocatedPeak()
    if isinstance(run, RewardRun):
        from l2d_framework.training.reward.run import train_reward

        train_reward(run, callbacks=[measure])
    else:
        train_runs([run], callbacks=lambda _: [measure])
    return {**found, "measured": measure.peak, "parameters": planned["parameters"]["total"]}


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a language model; a random one if absent.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Name of a case; all if absent.")] = None,
    rows: Annotated[int, typer.Option(min=4, help="Of an update.")] = 8,
    length: Annotated[int, typer.Option(min=16, help="Tokens of a row.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Result file; bench/results/memory_cpu.json if absent.")] = None,
    alone: Annotated[bool, typer.Option("--alone", hidden=True)] = False,
) -> None:
    """Measure, print a table, and add each case to the result file, which keeps others of the same settings."""
    torch.set_num_threads(1)
    if alone:
        assert model is not None
        assert case is not None
        with tempfile.TemporaryDirectory() as folder:
            found = compare(run_of(CASES[case[0]], model, Path(folder), rows, length))
        print(json.dumps(found), flush=True)
        return
    check_known("--case", case or (), CASES)
    if model is not None:
        model = Path(known_model(str(model)))
    out = result_file(out, "memory_cpu.json")
    card = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"limit": LIMIT, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        where, name = model, "random Llama"
        if where is None:
            where = Path(folder)
            write_model(where, SHAPE)
        else:
            name = where.name
        settings = {"rows": rows, "length": length, "shape": None if model else SHAPE}
        before = card["models"].get(name, {})
        results: dict[str, Any] = before["cases"] if before.get("settings") == settings else {}
        card["models"][name] = {"settings": settings, "cases": results}
        for chosen in case or list(CASES):
            options = ["--alone", "--model", where, "--case", chosen, "--rows", rows, "--length", length]
            words = [sys.executable, __file__, *map(str, options)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip() or f"its process ended with code {done.returncode}"
                raise L2DError(f"--case {chosen!r}: {said.splitlines()[-1]}")
            row = results[chosen] = json.loads(done.stdout.splitlines()[-1])
            off = row["peak"] / row["measured"] - 1
            print(f"{name:14} {chosen:34} {row['peak'] / 2**20:9,.0f} {row['measured'] / 2**20:9,.0f} MiB {off:+8.1%}")
            write_card(out, card | environment(1))


if __name__ == "__main__":
    run_script(main)
