"""Values that travel between the six interfaces.

Shapes use seven letters everywhere: B batch, S sequence, L positions being denoised, D state, H hidden, V vocabulary,
and N for a flat count. Time t runs from 0 (noise) to 1 (data).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A batch of token sequences together with who may see whom.

    A noisy position of block k sees clean tokens of blocks < k and noisy states of block k, never a token of its own or
    of a later block; known tokens that stand after it only where the backbone declares `sees_later`.

    Attributes:
        tokens: token ids, (B, S), int64; padding holds any valid id.
        blocks: -1 for padding, 0 for known from the start, k >= 1 for denoised k-th, (B, S), int64.
    """

    tokens: Tensor
    blocks: Tensor

    @property
    def present(self) -> Tensor:
        """True where a real token stands, (B, S), bool."""
        return self.blocks >= 0


class Context(Protocol):
    """What a backbone remembers of the clean tokens; opaque to everything but that backbone."""

    def select(self, rows: Tensor) -> Self:
        """Context of some rows, in the given order; a row may be repeated.

        Args:
            rows: row numbers, (B',), int64.

        Returns:
            A context of B' rows that shares no mutable state with this one.
        """
        ...


@dataclass(frozen=True)
class Stride:
    """The move that an evaluation is for, as the grid of the solve tells it.

    Attributes:
        length: of the interval of the grid that the solver is crossing, in units of time; 0 where it chooses its own.
        stages: evaluations it makes to cross it.
        evaluates_end: whether one of them is at its end.
    """

    length: float = 0.0
    stages: int = 1
    evaluates_end: bool = False


@dataclass(frozen=True)
class Query:
    """One question to the network: which tokens stand at `positions`, given their noisy states?

    Attributes:
        x: noisy states, (B, L, D), float32.
        t: times, (B, L), float32.
        positions: slots of the sequence asked about, (B, L), int64.
        context: the backbone's memory of the clean tokens.
        condition: class of each position, (B, L), int64, or None for unconditional.
        previous: for self-conditioning, logits of the previous evaluation, (B, L, V), or what the parametrization's
            `remember` made of them, (B, L, M); None at the first, which means the same as logits of zero.
        carried: the backbone's hidden states about these positions at the previous evaluation, (B, L, H), where it
            declares `carries`; None at the first, which means the same as zeros.
        shared_time: the time as a number when all entries of `t` are equal and it is known on the host, else None.
        guidance_scale: scale per position that overrides the guidance's own, (B, L), float32, or None.
        compiled: run layers as torch.compile makes them, where the backbone declares `compiles`.
    """

    x: Tensor
    t: Tensor
    positions: Tensor
    context: Context
    condition: Tensor | None = None
    previous: Tensor | None = None
    carried: Tensor | None = None
    shared_time: float | None = None
    guidance_scale: Tensor | None = None
    compiled: bool = False

    def replace(self, **changes: Any) -> Query:
        """Copy with some fields changed.

        Args:
            **changes: new values by field name.

        Returns:
            A new query.
        """
        return replace(self, **changes)


@dataclass(frozen=True)
class Prediction:
    """An answer to a query.

    Attributes:
        logits: (B, L, V), float32.
        clean: estimate of the clean state, (B, L, D), or None to let the parametrization derive it from `logits`.
        hidden: hidden states that the logits were made from, (B, L, H), where the backbone carries them on; guidance
            need not hand them on.
    """

    logits: Tensor
    clean: Tensor | None = None
    hidden: Tensor | None = None


class Predict(Protocol):
    """The network as guidance sees it."""

    def __call__(self, query: Query) -> Prediction:
        """Answer one query.

        Args:
            query: what to predict.

        Returns:
            The prediction.
        """
        ...

    def together(self, queries: list[Query]) -> list[Prediction]:
        """Answer several queries about the same positions in one pass of the network.

        Args:
            queries: queries that differ in anything but `positions` and `context`.

        Returns:
            One prediction per query, in order.
        """
        ...


class Space(Protocol):
    """The state space at one evaluation, as guidance sees it."""

    @property
    def layout(self) -> Layout:
        """The sequence so far: tokens and blocks, (B, S); the slots asked about are known from the query alone."""
        ...

    @property
    def evaluation(self) -> int:
        """Number of this evaluation in its block, from 0."""
        ...

    def record(self, name: str, values: Tensor) -> None:
        """Note a number per row for whoever generates, such as a reward; the first of a name at an evaluation counts.

        Args:
            name: of the number.
            values: (B,), float.
        """
        ...

    def random(self) -> Random:
        """Random numbers for guidance, one stream per token asked about, independent of those of estimates.

        Returns:
            The same streams at every evaluation; they go on where they were, or start over for solvers that compare
            slopes. Use `uniform` only.
        """
        ...

    def estimate(self, logits: Tensor) -> Tensor:
        """Clean state the solver is to move towards.

        Draws from the evaluation's own random stream, so two calls draw independently.

        Args:
            logits: (B, L, V), float32.

        Returns:
            (B, L, D), float32.
        """
        ...

    def encode(self, tokens: Tensor) -> Tensor:
        """Clean states of tokens.

        Args:
            tokens: (B, L), int64.

        Returns:
            (B, L, D), float32.
        """
        ...


class Random(Protocol):
    """Random numbers in which every token owns an independent stream."""

    def uniform(self) -> Tensor:
        """Next number of every stream.

        Returns:
            Numbers in [0, 1), (B, L), float32.
        """
        ...

    def normal(self, size: int) -> Tensor:
        """Next `size` standard normal numbers of every stream.

        Args:
            size: how many per token.

        Returns:
            (B, L, size), float32.
        """
        ...

    def seeds(self) -> Tensor:
        """Next seed of every stream, for numbers too many to draw here.

        Returns:
            Non-negative integers below 2^63, (B, L), int64, on the host.
        """
        ...

    @property
    def device(self) -> Any:
        """Where the numbers are wanted, a torch device."""
        ...


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another code base, read by a converter plugin.

    Attributes:
        parts: `schedule`, `parametrization`, `backbone`, `block_size` and the number of classes `num_classes`, as in a
            run file; None for a reward model, which is a sequence classifier with one output and no diffusion model.
        own: the diffusion model's weights under this package's names, without those of the language model.
        base_config: transformers config of the language model or the sequence classifier.
        base: its weights under transformers' names.
        lost: weights that the other code base fails to save, with the reason in a sentence; `base` can supply them.
        chat_template: name of a shipped template for conversations; None for the tokenizer's own.
        notes: what the user should know of the reading, a sentence each.
    """

    parts: dict[str, Any] | None
    own: dict[str, Tensor]
    base_config: dict[str, Any]
    base: dict[str, Tensor]
    lost: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    notes: tuple[str, ...] = ()
