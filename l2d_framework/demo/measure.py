"""Held-out answers of the base model, of LoRA and of L2D, at every number of evaluations and while they learn."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from l2d_framework.demo.task import Data, Question
from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.evaluation.statistics import Estimate, mean
from l2d_framework.generation.prompts import encode_prompts
from l2d_framework.models import checkpoint
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.opening import open_model, open_tokenizer
from l2d_framework.training.output_dir import checkpoints

BASE, LORA, L2D = "base", "lora", "l2d"
"""Output folders of the three stages, and what each outcome is of."""
EVALUATIONS = (3, 7, 15, 31)
FIXED, ADAPTIVE = ("euler", "midpoint"), "fehlberg2"
DEFAULT = ("midpoint", 15)
"""Solver and evaluations of the preset `l2d-paper`."""
WAYS: list[tuple[str, str | None, dict[str, Any]]] = [
    (BASE, None, {}),
    (LORA, None, {}),
    (L2D, None, {"num_inference_steps": 1}),
    *((L2D, name, {"solver": name, "num_inference_steps": count}) for name in FIXED for count in EVALUATIONS),
    (L2D, ADAPTIVE, {"preset": "l2d-adaptive"}),
]
"""Stage, solver and sampling of every way of answering."""

_BATCH = 500
_AT_ONCE = min(2, os.cpu_count() or 1)
_SHOWN = 3

Marks = NDArray[np.bool_]
"""Right or wrong, one entry per question."""


def score(marks: Marks) -> Estimate:
    """Share p of right answers and its standard error sqrt(p (1 - p) / N)."""
    share = float(marks.mean())
    return Estimate(share, float(np.sqrt(share * (1 - share) / len(marks))), len(marks))


def difference(first: Marks, second: Marks) -> Estimate:
    """How much better the second does on the same questions; pairing removes what those have in common."""
    return mean(second.astype(float) - first.astype(float))


@dataclass(frozen=True)
class Sheet:
    """Answers to a set of questions, and network evaluations spent on each."""

    questions: list[Question]
    answers: list[str]
    evaluations: list[int]

    @property
    def marks(self) -> Marks:
        """Right or wrong, (N,)."""
        return np.array([q.completion == answer for q, answer in zip(self.questions, self.answers, strict=True)])

    @property
    def score(self) -> Estimate:
        """Exact match."""
        return score(self.marks)


@dataclass(frozen=True)
class Outcome:
    """How one way of answering fares: a stage, with L2D the solver if there is anything to solve, and its answers."""

    model: str
    solver: str | None
    new: Sheet
    old: Sheet

    @property
    def evaluations(self) -> float:
        """Mean network evaluations per answer about the new skill."""
        return float(np.mean(self.new.evaluations))


@dataclass(frozen=True)
class Milestone:
    """What a stage has learned after so many updates."""

    updates: int
    new: Sheet
    old: Sheet


@dataclass(frozen=True)
class Denoising:
    """How one answer takes shape."""

    chosen: str  # why this question is shown
    prompt: str
    completion: str
    times: list[float]  # of each evaluation
    tokens: list[str]  # the most likely ones; those of the last evaluation first
    probabilities: list[list[float]]  # of each token at each evaluation


class Measurement:
    """The three trained models in the folder of a demo, and the questions they answer."""

    def __init__(self, folder: Path, data: Data) -> None:
        self._folder = folder
        self._tokenizer: PreTrainedTokenizerBase = open_tokenizer(folder / BASE)
        parts = (data.held_out_new, data.held_out_old)
        self._parts = [(questions, self._batches(questions)) for questions in parts]
        self._models = {name: _open(name, folder / name) for name in (BASE, LORA, L2D)}

    def outcomes(self, after_each: Callable[[], None]) -> list[Outcome]:
        """Let all models answer all held-out questions: base, LoRA, L2D at one evaluation, then with each solver."""
        asked = [(self._models[name], sampling) for name, _, sampling in WAYS]
        sheets = self._sheets(asked, after_each)
        return [Outcome(name, solver, *pair) for (name, solver, _), pair in zip(WAYS, sheets, strict=True)]

    def learning(self, outcomes: list[Outcome], after_each: Callable[[], None]) -> dict[str, list[Milestone]]:
        """What LoRA and L2D could after each checkpoint, from the base model to their outcomes."""
        base, lora = outcomes[:2]
        sampling = {"solver": DEFAULT[0], "num_inference_steps": DEFAULT[1]}
        ways = {LORA: (lora, {}), L2D: (in_default_way(outcomes), sampling)}
        learning = {}
        for name, (end, how) in ways.items():
            *before, last = sorted(
                (int(path.name.rpartition("-")[2]), path) for path in checkpoints(self._folder / name)
            )
            sheets = self._sheets([(_open(name, path), how) for _, path in before], after_each)
            milestones = [Milestone(updates, *pair) for (updates, _), pair in zip(before, sheets, strict=True)]
            learning[name] = [Milestone(0, base.new, base.old), *milestones, Milestone(last[0], end.new, end.old)]
        return learning

    def denoisings(self, outcomes: list[Outcome]) -> list[Denoising]:
        """Watch answers take shape, with the default solver and the most evaluations."""
        base = outcomes[0].new
        last = next(one.new for one in reversed(outcomes) if one.solver == DEFAULT[0])
        kind = "questions that the base model gets wrong and L2D right"
        wanted = (last.marks & ~base.marks).nonzero()[0].tolist()
        if not wanted:
            kind, wanted = "held-out questions", list(range(len(base.questions)))
        questions = [base.questions[row] for row in wanted[:_BATCH]]
        seen: list[Evaluation] = []
        most = {"solver": DEFAULT[0], "num_inference_steps": EVALUATIONS[-1], "observer": seen.append}
        _answer(self._models[L2D], self._encode(questions), most)
        times = [float(evaluation.t[0, 0]) for evaluation in seen]
        probabilities = torch.stack([evaluation.logits[:, 0].softmax(-1) for evaluation in seen])
        answer = probabilities[-1].argmax(-1, keepdim=True)
        late = (probabilities[-1] - probabilities[1]).gather(-1, answer)[:, 0]
        chosen = {0: f"the first of the {kind}"}
        chosen.setdefault(int(late.argmax()), f"of {len(questions)} such, the one that gains most after the first move")
        return [self._shown(questions[row], why, times, probabilities[:, row]) for row, why in chosen.items()]

    def _shown(self, question: Question, chosen: str, times: list[float], probabilities: Tensor) -> Denoising:
        best = torch.cat([probabilities[row].topk(_SHOWN).indices for row in (-1, 0, 1)])
        shown = list(dict.fromkeys(best.tolist()))
        curves = probabilities[:, shown].T.tolist()
        return Denoising(chosen, question.prompt, question.completion, times, self._texts(shown), curves)

    def _texts(self, tokens: list[int]) -> list[str]:
        return [str(self._tokenizer.decode([token])) for token in tokens]

    def _encode(self, questions: list[Question]) -> Tensor:
        return torch.tensor(encode_prompts(self._tokenizer, [question.prompt for question in questions]))

    def _sheets(self, asked: list[tuple[Any, dict[str, Any]]], after_each: Callable[[], None]) -> list[list[Sheet]]:
        """Answers of models to both kinds of questions, each computed on one core and as many at once as there are."""
        sheets = []
        with ThreadPoolExecutor(_AT_ONCE, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for pair in pool.map(lambda way: [self._sheet(*part, *way) for part in self._parts], asked):
                sheets.append(pair)
                after_each()
        return sheets

    def _batches(self, questions: list[Question]) -> list[Tensor]:
        # Operations of one and of two words make prompts of two lengths.
        groups = groupby(questions, lambda question: len(question.operation.split()))
        return [prompts for _, group in groups for prompts in self._encode(list(group)).split(_BATCH)]

    def _sheet(self, questions: list[Question], batches: list[Tensor], model: Any, sampling: dict[str, Any]) -> Sheet:
        answers: list[str] = []
        evaluations: list[int] = []
        for prompts in batches:
            tokens, spent = _answer(model, prompts, sampling)
            answers += self._texts(tokens.tolist())
            evaluations += spent.tolist()
        return Sheet(questions, answers, evaluations)


def in_default_way(outcomes: list[Outcome]) -> Outcome:
    """L2D as the preset `l2d-paper` samples."""
    return next(outcome for outcome in outcomes if (outcome.solver, outcome.evaluations) == DEFAULT)


def _open(name: str, folder: Path) -> Any:
    # Language models by transformers alone, so that agreement with it says something.
    return checkpoint.load(folder) if name == L2D else open_model(AutoModelForCausalLM, folder)[0].eval()


def _answer(model: Any, prompts: Tensor, sampling: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Answer tokens and evaluations spent, (B,)."""
    if isinstance(model, DiffusionLM):
        made = model.generate(prompts, max_new_tokens=1, do_sample=False, **sampling)
        return made.answers[:, 0], made.evaluations[:, 0]
    mask = torch.ones_like(prompts)
    tokens = model.generate(prompts, attention_mask=mask, max_new_tokens=1, do_sample=False)[:, -1]
    return tokens, torch.ones_like(tokens)
