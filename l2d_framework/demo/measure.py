"""Held-out answers of the base model, of LoRA and of L2D at every number of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from l2d_framework.demo.runs import BASE, L2D, LORA, Data
from l2d_framework.demo.scores import Outcome, Sheet
from l2d_framework.demo.task import Question
from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.generation.prompts import encode_prompts
from l2d_framework.models import checkpoint
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.opening import open_model, open_tokenizer

EVALUATIONS = (3, 7, 15, 31)
FIXED = ("euler", "midpoint")
ADAPTIVE = "fehlberg2"
DEFAULT = ("midpoint", 15)
"""Solver and evaluations of the preset `l2d-paper`."""

_BATCH = 500
_SHOWN = 3

Answer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From prompts, (B, S), to answer tokens, (B,), and evaluations spent, (B,)."""


@dataclass(frozen=True)
class Denoising:
    """How one answer takes shape.

    Attributes:
        question: what was asked.
        chosen: why this question is shown.
        tokens: the most likely tokens, as text; those of the last evaluation first.
        times: of each evaluation.
        probabilities: of each token at each evaluation.
    """

    question: Question
    chosen: str
    tokens: list[str]
    times: list[float]
    probabilities: list[list[float]]


class Measurement:
    """The three trained models and the questions they answer.

    Args:
        folder: of the demo.
        data: its questions.
    """

    def __init__(self, folder: Path, data: Data) -> None:
        self._data = data
        self._tokenizer: PreTrainedTokenizerBase = open_tokenizer(folder / BASE)
        self._model = checkpoint.load(folder / L2D)
        self._ways: list[tuple[str, str | None, Answer]] = [
            ("base", None, _plain(folder / BASE)),
            ("lora", None, _plain(folder / LORA)),
            ("l2d", None, _diffused(self._model, num_inference_steps=1)),
        ]
        for solver in FIXED:
            self._ways += [
                ("l2d", solver, _diffused(self._model, solver=solver, num_inference_steps=n)) for n in EVALUATIONS
            ]
        self._ways.append(("l2d", ADAPTIVE, _diffused(self._model, preset="l2d-adaptive")))

    @property
    def rounds(self) -> int:
        """How many outcomes there will be."""
        return len(self._ways)

    def outcomes(self, after_each: Callable[[], None]) -> list[Outcome]:
        """Let every model answer every held-out question in every way.

        Args:
            after_each: called after each way.

        Returns:
            Base, LoRA, L2D at one evaluation, L2D with each solver at each number of evaluations, L2D adaptive.
        """
        found = []
        for model, solver, answer in self._ways:
            sheets = [
                self._sheet(questions, answer) for questions in (self._data.held_out_new, self._data.held_out_old)
            ]
            found.append(Outcome(model, solver, *sheets))
            after_each()
        return found

    def denoisings(self, outcomes: list[Outcome]) -> list[Denoising]:
        """Watch answers take shape, with the default solver and the most evaluations.

        Args:
            outcomes: what `outcomes` returned.

        Returns:
            Of the new questions that the base model gets wrong and L2D right, or of all if there are none, the first
            and the one whose answer gains most probability after the first move.
        """
        base = outcomes[0].new
        last = next(one.new for one in reversed(outcomes) if one.solver == DEFAULT[0])
        kind = "questions that the base model gets wrong and L2D right"
        wanted = (last.marks & ~base.marks).nonzero()[0].tolist()
        if not wanted:
            kind, wanted = "held-out questions", list(range(len(base.questions)))
        questions = [base.questions[row] for row in wanted[:_BATCH]]
        times, probabilities = self._watch(questions)
        answer = probabilities[-1].argmax(-1, keepdim=True)
        late = (probabilities[-1] - probabilities[1]).gather(-1, answer)[:, 0]
        chosen = {0: f"the first of the {kind}"}
        chosen.setdefault(int(late.argmax()), f"of {len(questions)} such, the one that gains most after the first move")
        return [self._shown(questions[row], why, times, probabilities[:, row]) for row, why in chosen.items()]

    def _watch(self, questions: list[Question]) -> tuple[list[float], Tensor]:
        """Times of all evaluations and the probabilities there, (evaluations, questions, V)."""
        seen: list[Evaluation] = []
        self._model.generate(
            self._encode(questions),
            solver=DEFAULT[0],
            num_inference_steps=EVALUATIONS[-1],
            max_new_tokens=1,
            do_sample=False,
            observer=seen.append,
        )
        times = [float(evaluation.t[0, 0]) for evaluation in seen]
        return times, torch.stack([evaluation.logits[:, 0].softmax(-1) for evaluation in seen])

    def _shown(self, question: Question, chosen: str, times: list[float], probabilities: Tensor) -> Denoising:
        best = [probabilities[row].topk(_SHOWN).indices.tolist() for row in (-1, 0, 1)]
        shown = list(dict.fromkeys(token for row in best for token in row))
        names = [self._text(token) for token in shown]
        return Denoising(question, chosen, names, times, probabilities[:, shown].T.tolist())

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _encode(self, questions: list[Question]) -> Tensor:
        return torch.tensor(encode_prompts(self._tokenizer, [question.prompt for question in questions]))

    def _sheet(self, questions: list[Question], answer: Answer) -> Sheet:
        answers: list[str] = []
        evaluations: list[int] = []
        # Operations of one and of two words make prompts of two lengths.
        for _, same_length in groupby(questions, lambda question: len(question.operation.split())):
            for prompts in self._encode(list(same_length)).split(_BATCH):
                tokens, spent = answer(prompts)
                answers += [self._text(token) for token in tokens.tolist()]
                evaluations += spent.tolist()
        return Sheet(questions, answers, evaluations)


def _plain(folder: Path) -> Answer:
    # By transformers alone, so that agreement with it says something.
    lm: Any = open_model(AutoModelForCausalLM, folder)[0].eval()

    def answer(prompts: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ones_like(prompts)
        tokens = lm.generate(prompts, attention_mask=mask, max_new_tokens=1, do_sample=False)[:, -1]
        return tokens, torch.ones_like(tokens)

    return answer


def _diffused(model: DiffusionLM, **sampling: Any) -> Answer:
    def answer(prompts: Tensor) -> tuple[Tensor, Tensor]:
        found = model.generate(prompts, max_new_tokens=1, do_sample=False, **sampling)
        return found.answers[:, 0], found.evaluations[:, 0]

    return answer
