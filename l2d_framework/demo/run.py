"""The demo from an empty folder to its report; what it trains is a run file as any user writes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import TrainerCallback

from l2d_framework.config import Run, load_run
from l2d_framework.demo.measure import BASE, L2D, LORA, Measurement
from l2d_framework.demo.plots import ACCURACY, DENOISING, draw_accuracy, draw_denoisings
from l2d_framework.demo.report import Results, markdown, to_json
from l2d_framework.demo.task import Data, make_data, write_questions
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.plots import can_plot
from l2d_framework.training.output_dir import read_card
from l2d_framework.training.run import train_runs
from l2d_framework.writing import write_whole

_RUN_FILE = "runs.yaml"
_LENGTH = 32
_CONFIG = {
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


class Size(NamedTuple):
    """How much to train and to measure."""

    base: int  # questions for the base model
    new: int  # and for the finetunings
    base_updates: int
    updates: int
    checkpoints: int  # of each finetuning; all are measured
    answers: int  # held-out questions of a kind

    def questions(self, seed: int) -> Data:
        """All questions; the same seed gives the same ones."""
        return make_data(seed, base=self.base, new=self.new, answers=self.answers)


FULL = Size(base=40_000, new=100_000, base_updates=800, updates=2250, checkpoints=6, answers=2000)
QUICK = Size(base=600, new=300, base_updates=10, updates=10, checkpoints=2, answers=100)
"""Enough to see that everything works, far too little to learn anything."""


def run_file(folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """Contents of the run file: pretraining, then a LoRA for comparison and L2D, both from the first stage.

    L2D's settings come from about ten trials on other held-out questions, LoRA's from none; the learning rates are high
    because the models are tiny.
    """

    def stage(name: str, kind: str, learning_rate: float, how: dict[str, Any], **more: int) -> dict[str, Any]:
        data, updates = ("base", size.base_updates) if name == BASE else ("new", size.updates)
        training: dict[str, Any] = {"max_steps": updates, "batch_size": 128, "learning_rate": learning_rate}
        training |= {"warmup_steps": min(50, updates), "warmup": "linear", "logging_steps": 100, **more}
        if name != BASE:
            training |= {"save_steps": updates // size.checkpoints, "save_total_limit": size.checkpoints}
        return {
            "kind": kind,
            **({} if name == BASE else {"model": {"base": str(folder / BASE)}}),
            **how,
            "data": {"train": [{"path": str(_data_file(folder, data))}], "max_length": _LENGTH},
            "training": training,
            "output_dir": str(folder / name),
            "seed": seed,
        }

    # Merges end by themselves once every word and number is one token.
    scratch = {"scratch": {"tokenizer": {"vocab_size": 512}, "config": _CONFIG}}
    # At the default width of 256 the heads that modulate the layers would outweigh this base model.
    l2d = {
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding", "size": 64, "hidden": 64},
        "backbone": {"name": "two_stream", "rank": 32, "time_features": 64, "conditioning_size": 64},
    }
    lora = {"lora": {"rank": 32, "alpha": 32.0, "targets": "all-linear"}}
    return {
        "stages": [
            stage(BASE, "language_model", 4e-3, scratch),
            stage(LORA, "language_model", 8e-3, lora),
            stage(L2D, "diffusion", 5e-3, l2d, draws_per_token=4),
        ]
    }


def _data_file(folder: Path, name: str) -> Path:
    return folder / "data" / f"{name}.jsonl"


class Demo:
    """One demonstration in one folder; continued where it stopped if it is started there again."""

    def __init__(self, folder: Path, size: Size, seed: int) -> None:
        self.folder, self._name, self.size = folder.absolute(), folder, size
        self._text = yaml.safe_dump(run_file(self.folder, size, seed), sort_keys=False)
        path, problem = self.folder / _RUN_FILE, None
        if path.is_file():
            if path.read_text(encoding="utf-8") != self._text:
                problem = "holds a demo with other settings, such as another seed"
        elif self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            problem = "exists and holds no demo"
        if problem:
            raise ConfigError(
                f"{str(folder)!r} {problem}. Choose another --out, or use --overwrite, which moves it aside."
            )
        self.data = size.questions(seed)

    def prepare(self) -> list[Run]:
        """Write questions and run file, and read the runs to train; ConfigError where nothing can be written."""
        try:
            (self.folder / "data").mkdir(parents=True, exist_ok=True)
            # First, since it marks the folder as a demo's for whoever comes back to it.
            write_whole(self.folder / _RUN_FILE, self._text)
            for name, questions in self.data._asdict().items():
                write_questions(_data_file(self.folder, name), questions)
        except OSError as error:
            raise ConfigError(
                f"{str(self.folder)!r} cannot be written ({error.strerror or error}). Choose another --out."
            ) from error
        return load_run(self.folder / _RUN_FILE)

    def train(
        self, runs: Sequence[Run], callbacks: Callable[[Run], Sequence[TrainerCallback]], *, beside: bool
    ) -> None:
        """Train what is not trained yet; with `beside` LoRA in a process of its own, while this one trains L2D."""
        base, _, l2d = runs
        is_open = not (read_card(self.folder / LORA) or {}).get("finished")
        with self._training(LORA) if beside and is_open else nullcontext(lambda: None) as begin:
            train_runs([base], callbacks=callbacks)
            begin()
            train_runs([l2d], callbacks=callbacks)
        # What the other process did not finish is finished here, where its error is seen.
        train_runs(runs, callbacks=callbacks)

    @contextmanager
    def _training(self, name: str) -> Iterator[Callable[[], None]]:
        """Start a process that imports what it needs, and trains a stage once the function this yields is called."""
        imported = "import sys; from l2d_framework.demo.run import train_stage"
        code = f"{imported}; sys.stdin.read(1) and train_stage(*sys.argv[1:])"
        command = [sys.executable, "-P", "-c", code, str(self.folder / _RUN_FILE), name]
        silent: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, **silent)
        told: Any = process.stdin

        def begin() -> None:
            with suppress(BrokenPipeError):  # it has ended already
                told.write(b"\n")

        try:
            yield begin
        except BaseException:
            process.terminate()  # it saves a checkpoint
            raise
        finally:
            told.close()
            process.wait()

    def measure(self, after_each: Callable[[], None]) -> Results:
        """Let the trained models answer in every way of `WAYS`, and their checkpoints in one."""
        measurement = Measurement(self.folder, self.data)
        outcomes = measurement.outcomes(after_each)
        learning = measurement.learning(outcomes, after_each)
        cards = {name: read_card(self.folder / name) or {} for name in (BASE, LORA, L2D)}
        return Results(outcomes, learning, measurement.denoisings(outcomes), cards)

    def commands(self, program: str | None = None) -> list[str]:
        """What to try next, for where the demo was started, with a program that is found there unless one is named."""
        program = program or ("l2d" if shutil.which("l2d") else str(Path(sys.executable).with_name("l2d")))
        prompt = self.data.held_out_new[0].prompt
        generate = f'{program} generate {self._name / L2D} --prompt "{prompt}" --max-new-tokens 1'
        return [generate, f"{generate} --num-inference-steps 1"]

    def write(self, results: Results) -> list[str]:
        """Write report, numbers and, with matplotlib, pictures; returns the names of the files."""
        numbers = json.dumps(to_json(results), indent=2, ensure_ascii=False) + "\n"
        texts = {"report.md": markdown(results, self.data, self.commands("l2d")), "results.json": numbers}
        for name, text in texts.items():
            write_whole(self.folder / name, text)
        if not can_plot():
            return list(texts)
        draw_accuracy(results, self.folder / ACCURACY)
        draw_denoisings(results.denoisings, self.folder / DENOISING)
        return [*texts, ACCURACY, DENOISING]


def train_stage(run_file: str, name: str) -> None:
    """Train the stage of a demo's run file whose output folder has that name."""
    with one_thread():
        train_runs([run for run in load_run(Path(run_file)) if Path(str(run.output_dir)).name == name])


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core: matrices this small are slower on two, much slower where other work wants the second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
