"""The demo's run file: pretraining, a LoRA for comparison, and L2D, in the form any user writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from l2d_framework.demo.task import NEW, OLD, Question, Questions

RUN_FILE = "runs.yaml"
BASE, LORA, L2D = "base", "lora", "l2d"
"""Output folders of the three stages."""

_SHARE_OF_NEW = 0.04
_LENGTH = 32


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        base_questions: questions the base model is trained on.
        new_questions: questions both finetunings are trained on.
        base_updates: optimizer updates of the base model.
        updates: optimizer updates of either finetuning.
        answers: held-out questions about the new skill; as many about the old ones together.
    """

    base_questions: int
    new_questions: int
    base_updates: int
    updates: int
    answers: int


FULL = Size(base_questions=40_000, new_questions=30_000, base_updates=800, updates=1000, answers=2000)
QUICK = Size(base_questions=600, new_questions=300, base_updates=10, updates=10, answers=100)
"""Enough to see that everything works, far too little to learn anything."""


class Data(NamedTuple):
    """Questions that share none.

    Attributes:
        base: for training the base model, the new skill rare among the others.
        new: for finetuning, the new skill only.
        held_out_new: for measuring the new skill.
        held_out_old: for measuring the others, grouped by operation.
    """

    base: list[Question]
    new: list[Question]
    held_out_new: list[Question]
    held_out_old: list[Question]


def make_data(size: Size, seed: int) -> Data:
    """All questions of a demo.

    Args:
        size: how many.
        seed: the same seed gives the same questions.

    Returns:
        The questions.
    """
    source = Questions(seed)
    shares = {name: (1 - _SHARE_OF_NEW) / len(OLD) for name in OLD} | {NEW: _SHARE_OF_NEW}
    return Data(
        source.draw(size.base_questions, shares),
        source.draw(size.new_questions, {NEW: 1.0}),
        source.draw(size.answers, {NEW: 1.0}),
        [question for name in OLD for question in source.draw(size.answers // len(OLD), {name: 1.0})],
    )


def data_file(folder: Path, name: str) -> Path:
    """Where questions are written.

    Args:
        folder: of the demo.
        name: a field of `Data`.

    Returns:
        A JSONL file.
    """
    return folder / "data" / f"{name}.jsonl"


def run_file(folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """Contents of the run file: three stages, the last two from the first.

    L2D's settings come from about ten trials on other held-out questions, LoRA's from none; the learning rates are high
    because the models are tiny.

    Args:
        folder: of the demo; the runs write into it.
        size: how long to train.
        seed: of every run.

    Returns:
        JSON-ready fields, `stages` at the top.
    """
    return {"stages": [_base(folder, size, seed), _lora(folder, size, seed), _l2d(folder, size, seed)]}


def _base(folder: Path, size: Size, seed: int) -> dict[str, Any]:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": _LENGTH,
        "initializer_range": 0.06,
        "tie_word_embeddings": False,
    }
    # Merges end by themselves once every word and number is one token.
    scratch = {"tokenizer": {"vocab_size": 512}, "config": config}
    return {
        "kind": "language_model",
        "scratch": scratch,
        **_common(folder, "base", size.base_updates, learning_rate=4e-3),
        "output_dir": str(folder / BASE),
        "seed": seed,
    }


def _lora(folder: Path, size: Size, seed: int) -> dict[str, Any]:
    return {
        "kind": "language_model",
        "model": {"base": str(folder / BASE)},
        "lora": {"rank": 32, "alpha": 32.0, "targets": "all-linear"},
        **_common(folder, "new", size.updates, learning_rate=8e-3),
        "output_dir": str(folder / LORA),
        "seed": seed,
    }


def _l2d(folder: Path, size: Size, seed: int) -> dict[str, Any]:
    common = _common(folder, "new", size.updates, learning_rate=1e-2)
    common["training"]["draws_per_token"] = 4
    return {
        "kind": "diffusion",
        "model": {"base": str(folder / BASE)},
        "schedule": {"name": "linear"},
        # At the default width of 256 the heads that modulate the layers would outweigh this base model.
        "parametrization": {"name": "embedding", "size": 64, "hidden": 64},
        "backbone": {"name": "two_stream", "rank": 32, "time_features": 64, "conditioning_size": 64},
        **common,
        "output_dir": str(folder / L2D),
        "seed": seed,
    }


def _common(folder: Path, data: str, updates: int, *, learning_rate: float) -> dict[str, Any]:
    return {
        "data": {"train": [{"path": str(data_file(folder, data))}], "max_length": _LENGTH},
        "training": {
            "max_steps": updates,
            "batch_size": 128,
            "learning_rate": learning_rate,
            "warmup_steps": min(50, updates),
            "warmup": "linear",
            "logging_steps": 100,
        },
    }
