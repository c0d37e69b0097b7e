"""What is seen of an answer on its way: its text as it comes, drafts of it, and how much there is of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Self

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from typing_extensions import override

from l2d_framework.cli.meter import Meter
from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.types import Query
from l2d_framework.writing import speed

_REFRESH = 0.5
"""Seconds between two looks at a count that lies on the device."""
_UNSETTLED = 8
"""Characters at the end of a text that the next token may still change: half a character, a blank before a comma."""


class Printer(BaseStreamer):
    """Prints the text of an answer as its tokens come, and nothing of what `cut` takes off at its end.

    What the next token may still change is held back: as many characters as `stops`, the longest of them, has.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._held = max(_UNSETTLED, *map(len, stops), 0)
        self._ids: list[int] | None = None
        self._printed = 0

    @override
    def put(self, value: Tensor) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        self._print(self._held)

    @override
    def end(self) -> None:
        self._print(0)
        typer.echo()

    def _print(self, held: int) -> None:
        text = cut(self._tokenizer.decode(self._ids or [], skip_special_tokens=True), self._stops)
        end = max(self._printed, len(text) - held)
        typer.echo(text[self._printed : end], nl=False)
        self._printed = end


def cut(text: str, stops: Iterable[str]) -> str:
    """A text up to the first of the strings that end it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class Drafts:
    """An observer that shows the likeliest tokens of every evaluation in the place of the last, on a terminal only.

    `known` are tokens that stand there already, by position; one of `ends` ends what is shown.
    """

    def __init__(self, tokenizer: Any, ends: Iterable[int], known: Mapping[int, int] | None = None) -> None:
        self._tokenizer, self._ends = tokenizer, {*ends}
        self._tokens = {**(known or {})}
        self._live = Live(console=Console(stderr=True), transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, evaluation: Evaluation) -> None:
        """Show one draft."""
        if not self._live.console.is_terminal:
            return
        # Blocks that are finished stay in front of the one that is being denoised.
        drafted = evaluation.logits[0].argmax(-1).tolist()
        self._tokens |= zip(evaluation.positions[0].tolist(), drafted, strict=True)
        tokens = (self._tokens[place] for place in sorted(self._tokens))
        text = self._tokenizer.decode(
            [*takewhile(lambda token: token not in self._ends, tokens)], skip_special_tokens=True
        )
        self._live.update(Text(f"t = {float(evaluation.t[0, 0]):.2f}  {text}"), refresh=True)


class Watch(StoppingCriteria):
    """A criterion that ends nothing and counts tokens for a meter; evaluations, too, where a block has many tokens.

    Where tokens are guessed ahead, those that were wrong count, too.
    """

    def __init__(self, meter: Meter, lm: DiffusionLM, *, counts_evaluations: bool) -> None:
        self._meter, self._lm, self._counts = meter, lm, counts_evaluations
        pad = lm.backbone.lm.generation_config.pad_token_id
        self._pad = -1 if pad is None else pad
        self._evaluations = 0
        self._tokens: Tensor | int = 0
        self._told = 0.0

    def __enter__(self) -> Self:
        if self._counts:
            features = self._lm.features

            def counted(query: Query) -> Tensor:
                self._evaluations += 1
                self._tell()
                return features(query)

            # The one way to the network; an observer would have all logits made.
            self._lm.features = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        if self._counts:
            del self._lm.features

    @override
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new = input_ids[:, -1]
        # Rows that have ended go on with padding. The sum stays on the device until it is shown.
        self._tokens = self._tokens + (new != self._pad).sum()
        self._tell()
        return torch.zeros_like(new, dtype=torch.bool)

    def finish(self, prompts: int) -> None:
        """So many more prompts are answered."""
        self._told = 0.0
        self._tell()
        self._meter.advance(prompts)

    def _tell(self) -> None:
        now = self._meter.seconds
        if now - self._told < _REFRESH and self._told:
            return
        self._told = now
        tokens = int(self._tokens)
        facts = [f"{tokens:,} tokens", speed(tokens / now)] if tokens else []
        self._meter.facts = "  ".join(facts + [f"{self._evaluations:,} evaluations"] * self._counts)
