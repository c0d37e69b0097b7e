"""Run files of a few kilobytes: a random base model, sums as data, a dozen updates."""

import json
import random
from pathlib import Path
from typing import Any

from tiny_models import tiny_lm, tiny_tokenizer
from transformers import TrainerCallback


class Stop(TrainerCallback):
    """Ends a run when an update begins by an exception, which is as abrupt for the trainer as a kill."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def write_base(folder: Path, **overrides: Any) -> Path:
    """Folder with a random language model and its tokenizer."""
    tiny_lm("llama", **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_sums(path: Path, count: int = 22) -> Path:
    """JSON lines with sums of numbers of one to three digits, so that rows differ in length."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        a, b = draw.randrange(10 ** draw.randint(1, 3)), draw.randrange(100)
        rows.append({"prompt": f"{a}+{b}=", "completion": str(a + b), "kind": "odd" if a % 2 else "even"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tasks(folder: Path, *, rows: int = 3, tokens: int = 4) -> Path:
    """Folder with tasks of lm_eval whose examples are drawn: `sums`, which asks twice, and `choice` of one row."""
    folder.mkdir(exist_ok=True)
    write_sums(folder / "shown.jsonl", 7)
    write_sums(folder / "asked.jsonl", rows)
    write_sums(folder / "one.jsonl", 1)
    for name, file, rest in (("sums", "asked", _SUMS % tokens), ("choice", "one", _CHOICE)):
        data = f"{{train: {folder}/shown.jsonl, test: {folder}/{file}.jsonl}}"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\n"
            f"training_split: train\ntest_split: test\nnum_fewshot: 2\ndoc_to_text: '{{{{prompt}}}}'\n{rest}"
        )
    return folder


_SUMS = r"""
output_type: generate_until
repeats: 2
doc_to_target: '{{completion}}'
generation_kwargs: {until: ["\n"], max_gen_toks: %d, do_sample: true, temperature: 1.0}
metric_list: [{metric: exact_match}]
"""
_CHOICE = """
output_type: multiple_choice
doc_to_target: 0
doc_to_choice: ['{{completion}}', none]
metric_list: [{metric: acc}]
"""


def diffusion_run(base: Path, data: Path, output: Path, **training: Any) -> dict[str, Any]:
    """Fields of a small L2D run; `training` overrides its training section."""
    return {
        "model": {"base": str(base)},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding", "size": 8},
        "backbone": {"name": "two_stream", "rank": 2, "time_features": 8, "conditioning_size": 8},
        "data": {"train": [{"path": str(data)}], "eval_fraction": 0.25, "max_length": 64},
        "training": {**SMALL, **training},
        "output_dir": str(output),
    }


def tess_run(base: Path, data: Path, output: Path, **training: Any) -> dict[str, Any]:
    """Fields of a small TESS 2 run; `training` overrides its training section."""
    return {
        "model": {"base": str(base)},
        "schedule": {"name": "cosine"},
        "parametrization": {"name": "simplex"},
        "backbone": {"name": "in_place"},
        "sampling": {"num_inference_steps": 6},
        "data": {"train": [{"path": str(data)}], "eval_fraction": 0.25, "max_length": 24},
        "training": {**SMALL, "learning_rate": 3e-3, **training},
        "output_dir": str(output),
    }


def language_model_run(data: Path, output: Path, **fields: Any) -> dict[str, Any]:
    """Fields of a small next-token run; `fields` are at the top level, `training` among them is merged."""
    training = {**SMALL, **fields.pop("training", {})}
    return {
        "kind": "language_model",
        "data": {"train": [{"path": str(data)}], "eval_fraction": 0.25, "max_length": 64},
        "training": training,
        "output_dir": str(output),
        **fields,
    }


SMALL = {
    "max_steps": 9,
    "batch_size": 4,
    "learning_rate": 3e-2,
    "warmup_steps": 3,
    "logging_steps": 1,
    "save_steps": 3,
    "eval_steps": 3,
}


def losses(output: Path) -> dict[int, dict[str, float]]:
    """Everything called a loss that a finished run logged, by update."""
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    found: dict[int, dict[str, float]] = {}
    for entry in history:
        here = {name: value for name, value in entry.items() if "loss" in name and name != "train_loss"}
        found.setdefault(entry["step"], {}).update(here)
    return found
