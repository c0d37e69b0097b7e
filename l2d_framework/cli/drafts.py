"""Drafts of a whole answer on the terminal while it takes shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from l2d_framework.diffusion.ode import Evaluation


class Drafts:
    """An observer that shows the most likely tokens of every evaluation in the place of the last.

    Nothing is shown where standard error is no terminal.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ends = {tokenizer.eos_token_id, *ends}
        self._before: dict[int, list[int]] = {}
        self._live = Live(console=Console(stderr=True), transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        """Begin to show drafts."""
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the last draft off the terminal."""
        self._live.stop()

    def __call__(self, evaluation: Evaluation) -> None:
        """Show one draft."""
        if not self._live.console.is_terminal:
            return
        # Blocks that are finished stay in front of the one that is being denoised.
        self._before[int(evaluation.positions[0, 0])] = evaluation.logits[0].argmax(-1).tolist()
        tokens = [token for start in sorted(self._before) for token in self._before[start]]
        tokens = list(takewhile(lambda token: token not in self._ends, tokens))
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        self._live.update(Text(f"t = {float(evaluation.t[0, 0]):.2f}  {text}"), refresh=True)
