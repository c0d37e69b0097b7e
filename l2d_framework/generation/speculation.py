"""Speculation: tokens guessed ahead by the language model alone, whose diffusion is then solved all at once.

Source: the draft and verify of Leviathan et al. 2023, arXiv:2211.17192; here a guess is right if it is the very token
that diffusion picks with its own noise, so the answer is the one that would have been written token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

from l2d_framework.backbone import Backbone
from l2d_framework.diffusion.sampling import Sampling
from l2d_framework.errors import ConfigError

_MOST = 8
_FIRST = 0.7
"""Share of right guesses that is assumed before there were any."""
_MEMORY = 0.9
"""How much of that share an earlier round still counts after a later one."""


class Guesses:
    """How many tokens to guess ahead in the next round.

    Args:
        wanted: tokens, 0 for none, None for as many as pay.
        evaluations: of the network per token.
        width: what one more position costs in a pass of the network, in passes.

    Attributes:
        wanted: tokens, as above.
        made: guesses whose rightness was found out.
        right: how many of them were.
    """

    def __init__(self, wanted: int | None, evaluations: int, width: float) -> None:
        self.wanted, self._evaluations, self._width = wanted, evaluations, width
        self._share = _FIRST
        self.made = self.right = 0

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        wanted: int | None,
        sampling: Sampling,
        *,
        block_size: int | None,
        has_observer: bool,
        has_memory: bool = False,
    ) -> Guesses:
        """Guesses for a request; needs no weights.

        Args:
            backbone: the network.
            wanted: tokens, 0 for none, None for as many as pay.
            sampling: how to diffuse.
            block_size: of the model.
            has_observer: whether somebody looks on.
            has_memory: whether processors depend on more than tokens and scores, as a watermark does.

        Returns:
            None at all where an answer could come out differently and nobody insists.

        Raises:
            ConfigError: where it could, and a number of tokens is wanted.
        """
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
        width = 0.02 if backbone.table().device.type == "cuda" else 0.25
        return cls(wanted, steps or 100, width)

    def never(self) -> None:
        """Guess no more."""
        self.wanted = 0

    def count(self, room: int) -> int:
        """Tokens to guess now.

        Args:
            room: the most there can be.

        Returns:
            The number, 0 for none.
        """
        wanted = self.wanted
        if wanted is None:
            wanted = max(range(_MOST + 1), key=self._rate)
        return max(0, min(wanted, room))

    def _rate(self, count: int) -> float:
        """Tokens that a pass of the network yields with so many guesses."""
        share = min(self._share, 0.99)
        tokens = (1 - share ** (count + 1)) / (1 - share)
        rounds = self._evaluations * (1 + self._width * count)
        return tokens / (rounds + (1 if not count else count + 1 + self._width * count))

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
