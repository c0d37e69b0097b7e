"""Speculation: tokens guessed ahead, by the language model alone or by a drafter, and then solved all at once.

Source: the draft and verify of Leviathan et al. 2023, arXiv:2211.17192; here a guess is right if it is the very token
that diffusion picks with its own noise, so the answer is the one that would have been written token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from l2d_framework.backbone import Backbone
from l2d_framework.blame import described
from l2d_framework.diffusion.sampling import Sampling
from l2d_framework.drafter import Ahead, Drafter
from l2d_framework.errors import ConfigError, PluginError
from l2d_framework.generation.arguments import Running
from l2d_framework.generation.pass_times import pass_times
from l2d_framework.generation.replay import Rows
from l2d_framework.generation.sequences import Sequences

_COUNTS = (0, 1, 2, 3, 4, 8)
"""Numbers of tokens to choose from: each takes time to measure, and those between them hardly pay more."""
_FIRST = 0.7
"""Share of right guesses that is assumed before there were any."""
_MEMORY = 0.9
"""How much of that share an earlier round still counts after a later one."""
_RETURN = 0.02
"""How far it returns to what is assumed with every token that was not guessed."""


class MainPath(Drafter):
    """What the language model alone would write, the drafter unless another is named."""

    name: Literal["main_path"] = "main_path"

    @override
    def draft(self, ahead: Ahead, count: int) -> Tensor:
        return torch.stack([ahead.pick(ahead.language_model()) for _ in range(count)], 1)


class LookAhead:
    """`Ahead` of rows that the backbone has read up to `unread`, (B, n); nothing that is tried is kept."""

    def __init__(
        self,
        path: Rows,
        texts: Sequences,
        rows: list[int],
        *,
        unread: Tensor,
        lengths: list[int],
        numbers: Tensor | None,
    ) -> None:
        self._path, self._texts, self._rows = path, texts, rows
        self._unread, self._lengths, self._numbers = unread, lengths, numbers
        self._read = self._picked = 0

    @property
    def rows(self) -> list[int]:
        """Number of each row."""
        return list(self._rows)

    @property
    def tokens(self) -> list[Tensor]:
        """Prompt and answer so far of each row; copies."""
        texts, found = self._texts, self._texts.ids[self._rows]
        return [
            row[texts.width - length : texts.ends[number]]
            for row, length, number in zip(found, self._lengths, self._rows, strict=True)
        ]

    def language_model(self) -> Tensor:
        """Logits of the language model about the next token."""
        path = self._path
        path.extend(self._unread)
        self._read += self._unread.shape[1]
        self._unread = self._unread[:, :0]
        slots = torch.full((len(self._rows), 1), path.slots, device=self._unread.device)
        logits: Tensor = path.backbone.head(path.backbone.plain(slots, path.context))
        return logits.float()[:, 0]

    def pick(self, logits: Tensor) -> Tensor:
        """The next token from some logits."""
        numbers = None if self._numbers is None else self._numbers[:, self._picked]
        tokens, _ = self._texts.write(logits, self._rows, self._picked, numbers)
        self._picked += 1
        self._unread = torch.cat([self._unread, tokens[:, None]], 1)
        return tokens

    def draft(self, drafter: Drafter, count: int) -> Tensor:
        """Guesses, (B, n), of which any may be wrong but all are tokens; PluginError for anything else."""
        found: Any = drafter.draft(self, count)
        self._texts.forget(self._rows, self._picked)
        if self._read:
            self._path.rewind(torch.full((len(self._rows),), self._read, device=self._unread.device))
        is_sound = isinstance(found, Tensor) and found.dtype == torch.int64 and found.ndim == 2
        if not is_sound or len(found) != len(self._rows) or found.shape[1] > count:
            got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise PluginError(
                f"{described(drafter)} drafted {got} instead of int64 ({len(self._rows)}, {count} or less)."
            )
        drafted: Tensor = found.to(self._unread.device).clamp(0, self._path.backbone.vocab_size - 1)
        return drafted


class Guesses:
    """How many tokens to guess ahead in the next round.

    Args:
        wanted: tokens, 0 for none, None for as many as pay.
        evaluations: of the network per token.
        times: of passes of the network over so many positions each, in one unit.
        cost: of guessing a token, in passes over one position of every row.

    Attributes:
        wanted: tokens, as above.
        cost: as above.
        made: guesses whose rightness was found out.
        right: how many of them were.
    """

    def __init__(
        self, wanted: int | None, evaluations: int, times: Callable[[Sequence[int]], Sequence[float]], cost: float = 1.0
    ) -> None:
        self.wanted, self.cost, self._evaluations, self._times = wanted, cost, evaluations, times
        self._share = _FIRST
        self.made = self.right = 0

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        running: Running,
        sampling: Sampling,
        *,
        block_size: int | None,
        has_observer: bool,
        has_memory: bool = False,
    ) -> Guesses:
        """Guesses for a request; needs no weights.

        Args:
            backbone: the network.
            running: how many are wanted, and of which drafter.
            sampling: how to diffuse.
            block_size: of the model.
            has_observer: whether somebody looks on.
            has_memory: whether processors depend on more than tokens and scores, as a watermark does.

        Returns:
            None at all where an answer could come out differently and nobody insists.

        Raises:
            ConfigError: where it could, and a number of tokens is wanted; or a drafter, and no token.
        """
        wanted, drafter = running.guesses, running.drafter
        if drafter is not None and wanted == 0:
            raise ConfigError(
                f"{described(drafter).capitalize()} guesses nothing with speculate='off'. Set that to 'auto' or to a "
                "number of tokens, or leave the drafter out."
            )
        size = sampling.block_size or block_size
        steps = sampling.num_inference_steps
        for is_so, reason in (
            (size != 1, "this model denoises several tokens together"),
            (
                not (backbone.rewinds and backbone.identity_at_zero and backbone.independent_positions),
                f"backbone {backbone.config.component_name()!r} cannot guess ahead",
            ),
            (steps == 0, "without evaluations there is nothing to guess for"),
            (sampling.solver.batch_coupled, f"solver {sampling.solver.component_name()!r} couples tokens"),
            (sampling.patience is not None, "patience looks at one token after the other"),
            (has_observer, "an observer looks at one token after the other"),
            (has_memory, "a watermark remembers every token that is asked about"),
        ):
            if is_so and wanted:
                raise ConfigError(f"speculate={wanted} would change what happens: {reason}. Set it to 'off' or 'auto'.")
            if is_so:
                wanted = 0
        return cls(wanted, steps or 100, partial(pass_times, backbone))

    def never(self) -> None:
        """Guess no more."""
        self.wanted = 0

    def count(self, room: int, rows: int) -> int:
        """Tokens to guess now.

        Args:
            room: the most there can be.
            rows: how many answers go on.

        Returns:
            The number, 0 for none.
        """
        if room < 1 or self.wanted is not None:
            return max(0, min(self.wanted or 0, room))
        # Rows end one by one, and each number of them would have to be measured.
        rows = 1 << (rows - 1).bit_length()
        times = self._times([rows * (1 + count) for count in _COUNTS])
        rates = {count: self._rate(count, took, times[0]) for count, took in zip(_COUNTS, times, strict=True)}
        found = max((count for count in _COUNTS if count <= room), key=rates.__getitem__)
        if not found:  # what comes later may be easier to guess
            self._share += _RETURN * (_FIRST - self._share)
        return found

    def _rate(self, count: int, time: float, least: float) -> float:
        """Tokens per time with so many guesses, of passes over them and over one position of every row."""
        share = min(self._share, 0.99)
        tokens = (1 - share ** (count + 1)) / (1 - share)
        # One more reads the tokens.
        return tokens / ((self._evaluations + 1) * time + count * self.cost * least)

    def learn(self, count: int, right: Sequence[int]) -> None:
        """Take note of a round.

        Args:
            count: tokens guessed.
            right: how many of them were right, of each row that goes on.
        """
        for number in right:
            tried = min(number + 1, count)
            self.made, self.right = self.made + tried, self.right + number
            for i in range(tried):
                self._share = _MEMORY * self._share + (1 - _MEMORY) * (i < number)
