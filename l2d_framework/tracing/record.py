"""What every evaluation said about every token, in numbers small enough to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.errors import ConfigError

_LIKELIEST = 256
"""Tokens remembered per evaluation of a token once the whole distribution would take too much memory."""

_CHUNK = 2**20
"""Numbers worked on at once: next to a canvas of logits there must not be several more of its size."""

_BLOCK = 2**26
"""Bytes reserved at a time. The system hands out so many in a piece of their own, and only as they are written to."""

_DIGITS = 6
_DTYPES: dict[str, Any] = {
    **dict.fromkeys(("evaluation", "position", "ids"), np.int32),
    **dict.fromkeys(("t", "probabilities", "entropy", "kl", "final"), np.float32),
    **dict.fromkeys(("is_bound", "is_read_out"), np.bool_),
}


@dataclass(frozen=True)
class Trace:
    """How one sequence took shape; each of R rows is one evaluation of one position, in the order of evaluation."""

    tokens: list[int]
    """Id standing at each of the C positions in the end; beyond `length` what the last evaluation found likeliest."""
    length: int
    """Tokens of the prompt and of the answer; what a canvas holds behind the end of the answer comes after."""
    vocab_size: int
    evaluation: NDArray[Any]  # number of the network evaluation, from 0, (R,), int32
    position: NDArray[Any]  # where the token stands, (R,), int32
    t: NDArray[Any]  # time of the noisy state, (R,), float32
    ids: NDArray[Any]  # likeliest tokens, most likely first, (R, K), int32
    probabilities: NDArray[Any]  # of these, (R, K), float32
    entropy: NDArray[Any]  # of the whole distribution, in nats, (R,), float32
    kl: NDArray[Any]
    """Sum over the vocabulary of p log(p / q), where q is what the evaluation before said of the same position, in
    nats, (R,), float32; NaN at the first."""
    final: NDArray[Any]  # probability of the token that stands there in the end, (R,), float32
    is_bound: NDArray[Any]  # `final` is only known not to be larger, (R,), bool
    is_read_out: NDArray[Any]  # the evaluation whose logits yielded the token, (R,), bool

    @property
    def is_predicted(self) -> NDArray[Any]:
        """Which positions the model filled; the others were given, (C,), bool."""
        predicted = np.zeros(len(self.tokens), dtype=bool)
        predicted[self.position] = True
        return predicted

    def to_json(self) -> dict[str, Any]:
        """The same as lists, with six significant digits; a number that is not finite is None."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trace:
        """Read what `to_json` made, possibly after a round through text."""
        arrays: dict[str, Any] = {name: np.array(data[name], kind) for name, kind in _DTYPES.items()}
        return cls(**{**data, **arrays})


def _plain(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind != "f":
        return value.tolist()
    if value.ndim > 1:
        return [_plain(row) for row in value]
    return [float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else None for number in value.tolist()]


class _Rows(NamedTuple):
    """One evaluation of some positions."""

    t: Tensor
    position: Tensor
    ids: Tensor
    probabilities: Tensor
    entropy: Tensor
    kl: Tensor
    remembered: _Remembered
    is_read_out: bool


class _Remembered(NamedTuple):
    """Log-probabilities of all tokens in float16, or of the likeliest in float32 with their ids."""

    logs: Tensor
    ids: Tensor | None

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of one token per row, and whether it is merely a bound."""
        if self.ids is None:
            return self.logs.gather(1, tokens[:, None])[:, 0].float().exp(), torch.zeros_like(tokens, dtype=torch.bool)
        hit = self.ids == tokens[:, None]
        known = hit.any(1)
        column = torch.where(known, hit.int().argmax(1), self.logs.shape[1] - 1)
        return self.logs.gather(1, column[:, None])[:, 0].exp(), ~known


class _Pool:
    """Main memory apart from the heap, where what stays would lie between canvases that go, and tear holes."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def keep(self, values: Tensor) -> Tensor:
        """A copy."""
        size = values.numel() * values.element_size()
        aligned = -(-size // 8) * 8
        if aligned > len(self._block):
            self._block = torch.empty(max(aligned, _BLOCK), dtype=torch.uint8)
        piece, self._block = self._block[:size], self._block[aligned:]
        return piece.view(values.dtype).view(values.shape).copy_(values)


class Recorder:
    """An observer that remembers the evaluations of one answer.

    Which token stands at a position in the end is known only then, so every distribution is remembered: whole, as
    log-probabilities in float16 (a probability p is off by at most |log p| / 2048 of itself), as long as there is
    memory, afterwards only its 256 likeliest tokens. The probability of a token that is not among them is reported as
    that of the 256th, which it cannot exceed. Tokens among the `top` likeliest have their exact probability; `memory`
    is in bytes, for whole distributions.
    """

    def __init__(self, *, top: int = 5, memory: int = 2**29) -> None:
        if top < 2:
            raise ConfigError(f"top must be at least 2, so that there is a gap between the first two, got {top}.")
        self._top, self._memory, self._pool = top, memory, _Pool()
        self._evaluations: list[list[_Rows]] = []
        # Logits that the next evaluation of a position is compared with; gone as soon as the position is decided.
        self._before: dict[int, Tensor] = {}
        self._vocab_size = 0

    @torch.no_grad()
    def __call__(self, evaluation: Evaluation) -> None:
        """Remember an evaluation of one sequence, (1, L, V)."""
        if len(evaluation.positions) != 1:
            raise ConfigError(
                f"A trace follows one answer, got {len(evaluation.positions)} at once. Ask for one answer."
            )
        self._vocab_size = evaluation.logits.shape[-1]
        size = max(1, _CHUNK // self._vocab_size)
        parts = range(0, evaluation.positions.shape[1], size)
        self._evaluations.append([self._rows(evaluation, slice(start, start + size)) for start in parts])

    def _rows(self, evaluation: Evaluation, part: slice) -> _Rows:
        positions, logits = evaluation.positions[0, part].tolist(), evaluation.logits[0, part]
        logs = logits.float().log_softmax(-1)
        everything = logs.exp()
        probabilities, ids = everything.topk(min(self._top, self._vocab_size))
        kl = torch.full((len(positions),), math.nan)
        known = [row for row, position in enumerate(positions) if position in self._before]
        if known:
            earlier = torch.stack([self._before[positions[row]] for row in known]).float().log_softmax(-1)
            kl[known] = _divergence(logs[known], earlier).cpu()
        for row, position in enumerate(positions):
            if evaluation.is_read_out:
                self._before.pop(position, None)
            else:
                self._before[position] = logits[row]
        keep = self._pool.keep
        return _Rows(
            t=keep(evaluation.t[0, part].float()),
            position=keep(evaluation.positions[0, part].int()),
            ids=keep(ids.int()),
            probabilities=keep(probabilities),
            entropy=keep(torch.special.entr(everything).sum(-1)),
            kl=keep(kl),
            remembered=self._remember(logs),
            is_read_out=evaluation.is_read_out,
        )

    def _remember(self, logs: Tensor) -> _Remembered:
        self._memory -= 2 * logs.numel()
        if self._memory >= 0:
            return _Remembered(self._pool.keep(logs.half()), None)
        likeliest, ids = logs.topk(min(_LIKELIEST, logs.shape[-1]))
        return _Remembered(self._pool.keep(likeliest), self._pool.keep(ids.int()))

    def finish(self, sequence: Sequence[int]) -> Trace:
        """The trace, once the ids of the prompt and the answer, its end token included and no padding, are known."""
        if not self._evaluations:
            raise ConfigError("There is nothing to trace: the network was not evaluated. Use at least 1 step.")
        numbers = [number for number, parts in enumerate(self._evaluations) for _ in parts]
        rows = [part for parts in self._evaluations for part in parts]
        tokens = _final_tokens(rows, sequence)
        table = torch.tensor(tokens)
        final, is_bound = zip(*(_final(part, table[part.position]) for part in rows), strict=True)
        lengths = [len(part.position) for part in rows]
        columns: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in rows]).numpy()
            for name in ("t", "position", "ids", "probabilities", "entropy", "kl")
        }
        return Trace(
            tokens=tokens,
            length=len(sequence),
            vocab_size=self._vocab_size,
            evaluation=np.repeat(np.array(numbers, np.int32), lengths),
            final=torch.cat(final).numpy(),
            is_bound=torch.cat(is_bound).numpy(),
            is_read_out=np.repeat([part.is_read_out for part in rows], lengths),
            **columns,
        )


def _divergence(logs: Tensor, earlier: Tensor) -> Tensor:
    """Sum of p log(p / q); a token that cannot be drawn adds nothing, and rounding leaves nothing below zero."""
    return torch.where(logs.isneginf(), 0, logs.exp() * (logs - earlier)).sum(-1).clamp_min(0)


def _final_tokens(rows: Sequence[_Rows], sequence: Sequence[int]) -> list[int]:
    tokens = [int(token) for token in sequence]
    tokens += [0] * (1 + max(int(part.position.max()) for part in rows) - len(tokens))
    for part in rows:
        for position, token in zip(part.position.tolist(), part.ids[:, 0].tolist(), strict=True):
            if position >= len(sequence):
                tokens[position] = token
    return tokens


def _final(part: _Rows, tokens: Tensor) -> tuple[Tensor, Tensor]:
    probability, is_bound = part.remembered.of(tokens)
    hit = part.ids == tokens[:, None]
    exact = torch.where(hit, part.probabilities, 0).sum(1)
    shown = hit.any(1)
    return torch.where(shown, exact, probability), is_bound & ~shown
