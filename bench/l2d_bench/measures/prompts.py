"""Answers of a model to prompts, on canvases like those it was trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l2d_bench.measures.base import Subject, Value

if TYPE_CHECKING:
    from torch import Tensor

    from l2d_framework.generation.prompts import Prompt
    from l2d_framework.models.diffusion_lm import DiffusionLM

_DEFAULT_BATCH = 32


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        ids: its tokens, the end token included where there is one.
        text: the same as text, without special tokens.
        evaluations: of the network, mean over its tokens.
    """

    ids: list[int]
    text: str
    evaluations: float


class Answerer:
    """A model with the settings it is measured at; a plain language model answers at `num_inference_steps: 0`.

    Args:
        subject: the model.
        options: settings below those of the subject, such as `num_inference_steps`.
    """

    def __init__(self, subject: Subject, options: dict[str, Any]) -> None:
        from l2d_framework.evaluation.harness.options import diffusing
        from l2d_framework.models.unloaded import UnloadedModel

        dtype = None if subject.dtype == "auto" else subject.dtype
        own = subject.options
        source = UnloadedModel(
            subject.path, base=own.get("base"), dtype=own.get("dtype", dtype), revision=own.get("revision")
        )
        sampling = source.sampling(diffusing(options | subject.options))
        self.options = {name: getattr(sampling, name) for name in type(sampling).model_fields if name != "preset"}
        self.options["seed"] = subject.seed
        self.lm: DiffusionLM = source.load(subject.device)
        self.tokenizer: Any = source.tokenizer
        self.batch_size = subject.batch_size if isinstance(subject.batch_size, int) else _DEFAULT_BATCH

    def ask(self, prompts: Sequence[Prompt], canvas: int) -> list[Answer]:
        """Answer prompts, those of equal length together, so that an answer does not depend on its batch mates.

        Args:
            prompts: texts or conversations.
            canvas: tokens of prompt and answer together.

        Returns:
            One answer per prompt, in order.

        Raises:
            DataError: if a prompt fills the canvas.
        """
        from l2d_framework.errors import DataError
        from l2d_framework.generation.prompts import encode_prompts

        lengths = [len(ids) for ids in encode_prompts(self.tokenizer, list(prompts))]
        if max(lengths) >= canvas:
            raise DataError(
                f"A prompt has {max(lengths)} tokens and leaves no room on a canvas of {canvas}. Raise canvas."
            )
        found: dict[int, Answer] = {}
        for length in sorted(set(lengths)):
            equal = [i for i, own in enumerate(lengths) if own == length]
            for start in range(0, len(equal), self.batch_size):
                part = equal[start : start + self.batch_size]
                answers = self._batch([prompts[i] for i in part], canvas - length)
                found |= dict(zip(part, answers, strict=True))
        return [found[i] for i in range(len(prompts))]

    def go_on(self, prefixes: Sequence[Sequence[int]], length: int) -> list[str]:
        """Go on with texts that have equally many tokens.

        Args:
            prefixes: tokens of each.
            length: most tokens to add.

        Returns:
            What was added to each.
        """
        import torch

        found = []
        for start in range(0, len(prefixes), self.batch_size):
            ids = torch.tensor(prefixes[start : start + self.batch_size])
            found += [answer.text for answer in self._batch(ids, length)]
        return found

    def timed(self, prompts: Sequence[Prompt], length: int, rounds: int) -> tuple[list[float], int]:
        """Answer prompts together, `length` tokens each, once for nothing and then `rounds` times.

        Args:
            prompts: texts or conversations.
            length: tokens of an answer, whatever would end it.
            rounds: how often.

        Returns:
            Tokens per second of wall clock of each round; the most bytes allocated meanwhile, 0 without a GPU.
        """
        import torch

        on_gpu = self.lm.device.type == "cuda"
        speeds = []
        for _ in range(rounds + 1):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self.lm.device)
            start = time.perf_counter()
            self._batch(list(prompts), length, min_new_tokens=length)  # its answers are on the host
            speeds.append(len(prompts) * length / (time.perf_counter() - start))
        return speeds[1:], torch.cuda.max_memory_allocated(self.lm.device) if on_gpu else 0

    def _batch(self, prompts: list[Prompt] | Tensor, room: int, **decoding: Any) -> list[Answer]:
        made = self.lm.generate(prompts, max_new_tokens=room, do_sample=False, **decoding, **self.options)
        rows = zip(made.answers.tolist(), made.lengths.tolist(), made.evaluations.tolist(), strict=True)
        return [
            Answer(
                ids[:length],
                str(self.tokenizer.decode(ids[:length], skip_special_tokens=True)),
                sum(spent[:length]) / max(length, 1),
            )
            for ids, length, spent in rows
        ]


def share(scores: Sequence[float]) -> Value:
    """Mean and standard error of scores.

    Args:
        scores: one per item, at least one of them a number; NaN where an item has none.

    Returns:
        The mean over the items that have a number; with the scores where all have.
    """
    from l2d_framework.evaluation.statistics import mean

    found = mean(scores)
    assert found.value is not None
    return Value(
        value=found.value,
        error=found.standard_error,
        items=found.samples,
        scores=None if found.left_out else list(scores),
    )
