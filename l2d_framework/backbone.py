"""Backbone: the network that reads clean tokens and denoises noisy ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self

from pydantic import Field
from torch import Tensor, nn
from typing_extensions import TypeVar

from l2d_framework.component import Component
from l2d_framework.types import Context, Layout

if TYPE_CHECKING:
    from peft import PeftConfig  # takes seconds to import, as does the next
    from transformers import PreTrainedModel

C = TypeVar("C", bound=Context, default=Any)
"""What a backbone remembers; a `Backbone` without it is one whose contexts are nobody else's business."""


class BackboneConfig(Component):
    """Configuration of a backbone; `build` wraps a language model."""

    kind: ClassVar[str] = "backbone"

    num_classes: int = Field(default=0, ge=0)
    """Class labels the backbone can be conditioned on; 0 for none."""

    def check(self, lm_config: Any, block_size: int | None) -> None:
        """Refuse what this backbone cannot do, before any weights are loaded.

        Args:
            lm_config: the language model's transformers config.
            block_size: tokens denoised together, or None for one block per sequence.

        Raises:
            UnsupportedModelError: if the model family cannot be served.
            ConfigError: if the block size cannot be served.
        """

    @abstractmethod
    def build(self, lm: PreTrainedModel) -> Backbone:
        """Wrap a language model; on the meta device only shapes are made.

        Args:
            lm: a causal language model.

        Returns:
            The backbone, its own weights freshly initialised.

        Raises:
            UnsupportedModelError: if a self-test shows that the model cannot be served faithfully.
        """


def stacked(model: nn.Module) -> list[tuple[nn.Module]]:
    """Every member of a list of modules that lies in no other, by itself: the layers of a language model."""
    found: list[tuple[nn.Module]] = []
    for child in model.children():
        found += [(member,) for member in child] if isinstance(child, nn.ModuleList) else stacked(child)
    return found


class Backbone(nn.Module, ABC, Generic[C]):
    """The network: owns the embedding table, time and class conditioning, cache, visibility and label shift.

    Row i of everything returned is *about* the i-th queried position. A backbone that declares `identity_at_zero`
    returns the language model's own logits at t = 0; one that declares `independent_positions` lets no noisy position
    see another, so several queries about one position may share a pass.

    Attributes:
        config: the component this module was built from.
        vocab_size: V.
        hidden_size: H.
        lm: the wrapped language model.
    """

    identity_at_zero: ClassVar[bool] = False
    independent_positions: ClassVar[bool] = False
    rewinds: ClassVar[bool] = False
    """True when `rewind` is served, so that tokens may be guessed ahead and taken back."""
    joins: ClassVar[bool] = False
    """True when `join` is served, so that waiting prompts can take the places of rows that have ended."""
    compiles: ClassVar[bool] = False
    """True when `features` takes `compiled=True` and then runs layers as torch.compile makes them, where no gradients
    are recorded; hidden states may differ by rounding. Nothing of it is kept for questions without it."""
    trains_lm: ClassVar[bool] = False
    """True when the language model's own weights are what is trained; a checkpoint then holds all of them."""
    carries: bool = False
    """True when `carry` is served: each evaluation of a solve then goes on from the hidden states of the one before."""
    sees_later: bool = False
    """True when a noisy position sees known tokens that come after it, so that gaps in a text can be filled."""
    is_offloaded: bool = False
    """True when some layers lie elsewhere until they run; set where a model is loaded so."""
    block_size: int | None = None
    """Tokens denoised together, None for one block per sequence; set by `in_blocks`."""

    config: BackboneConfig
    vocab_size: int
    hidden_size: int
    lm: PreTrainedModel

    def in_blocks(self, size: int | None) -> Self:
        """Learn how many tokens the model it is a part of denoises together.

        Args:
            size: a number that `BackboneConfig.check` does not refuse, or None for one block per sequence.

        Returns:
            This backbone.
        """
        self.block_size = size
        return self

    @abstractmethod
    def table(self) -> Tensor:
        """The language model's input embedding table.

        Returns:
            (V, H).
        """

    @abstractmethod
    def read(self, layout: Layout) -> C:
        """Take in the clean tokens of a batch.

        Args:
            layout: tokens and their blocks, (B, S).

        Returns:
            A context from which positions 1..S can be denoised.
        """

    @abstractmethod
    def extend(self, context: C, tokens: Tensor) -> C:
        """Append clean tokens to a context.

        Args:
            context: what `read` or `extend` returned; not to be used afterwards.
            tokens: (B, N), int64; a block, or several that follow each other.

        Returns:
            The longer context, from which the positions just after each new token can be denoised.
        """

    def rewind(self, context: C, counts: Tensor) -> C:
        """Take back the last tokens of every row.

        Args:
            context: what `extend` returned; not to be used afterwards.
            counts: how many tokens of each row, (B,), int64; a token of each stays.

        Returns:
            A context to be extended before anything is asked. It is min(counts) slots shorter, and rows that lose more
            than that are moved to its end, behind so much padding.

        Raises:
            TypeError: if the backbone does not declare `rewinds`.
        """
        raise TypeError(f"{type(self).__name__} takes no tokens back.")

    def join(self, contexts: Sequence[C], slots: int) -> C:
        """The rows of several contexts in one.

        Args:
            contexts: what any other method returned; not to be used afterwards. Rows may be nothing but padding.
            slots: how many the result has, enough for the tokens of every row.

        Returns:
            A context to be extended before anything is asked: the last slots of each, behind so much padding where it
            has fewer.

        Raises:
            TypeError: if the backbone does not declare `joins`.
        """
        raise TypeError(f"{type(self).__name__} joins no contexts.")

    def fixed(self, context: C, slots: int, most: int) -> C | None:
        """A copy of a context in buffers of a fixed size, so that tokens can be denoised one by one without Python.

        Args:
            context: what `read` or `extend` returned.
            slots: tokens there is room for.
            most: tokens there will be room for at last, in a copy of this copy.

        Returns:
            A context whose tensors `extend` changes where they are, by one token at a time; neither that nor `select`
            makes the host wait or count. None where the backbone has no such thing for `most` tokens, the default.
        """
        return None

    @abstractmethod
    def features(
        self,
        h: Tensor,
        t: Tensor,
        positions: Tensor,
        context: C,
        condition: Tensor | None,
        *,
        shared_time: float | None = None,
    ) -> Tensor:
        """Hidden states from which `head` makes logits about the queried positions.

        Args:
            h: embedded noisy states, (B, L, H).
            t: times, (B, L), float32.
            positions: slots asked about, (B, L), int64.
            context: what `read` or `extend` returned.
            condition: class per position, (B, L), int64; None or -1 is unconditional.
            shared_time: the time as a number when all entries of `t` are equal.

        Returns:
            (B, L, H).
        """

    def carry(self, hidden: Tensor) -> Tensor:
        """What the hidden states of the previous evaluation add to the embedded noisy states.

        Args:
            hidden: what `features` returned, or `plain` where that answered instead, (B, L, H); zeros stand for no
                previous evaluation.

        Returns:
            (B, L, H); zeros for zeros.

        Raises:
            TypeError: if the backbone does not declare `carries`.
        """
        raise TypeError(f"{type(self).__name__} carries nothing from one evaluation to the next.")

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """Maps hidden states of positions, (B, n, H), to their logits, (B, n, V), float32, position by position.

        Its parameters are all that it uses, so that the loss can train them a few positions at a time.
        """

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Parameters that are trained without weight decay at a rate of their own, by the name of the group.

        Returns:
            Empty unless a backbone names some; `time` takes `training.time_learning_rate`.
        """
        return {}

    def units(self) -> Sequence[Sequence[nn.Module]]:
        """Modules whose weights are gathered together, and only while one of them runs, where processes share them.

        So are layers that wait in the host's memory or on the disk brought to the device that computes.

        A unit's weights are read in the `forward` of its modules and nowhere else, and by no module of another unit. Of
        several modules in one, all but the last run without gradients. What is in no unit, such as embeddings, stays
        gathered while a batch is learnt.

        Returns:
            Members of every list of modules in the language model, each by itself, unless a backbone says otherwise.
        """
        return stacked(self.lm)

    def plain(self, positions: Tensor, context: C) -> Tensor:
        """Hidden states of the language model alone, for `num_inference_steps = 0`.

        Args:
            positions: slots asked about, (B, L), int64.
            context: what `read` or `extend` returned.

        Returns:
            (B, L, H).

        Raises:
            TypeError: if the backbone does not declare `identity_at_zero`.
        """
        raise TypeError(f"{type(self).__name__} has no plain language model; use at least one inference step.")

    def merge(self, how: Literal["auto", "always", "never"] = "auto") -> None:
        """Get ready to generate: make what saves time and depends on weights only, such as adapters folded in.

        Called before every generation. What it makes is used where no gradients are recorded, and not any more once a
        weight has changed; the weights themselves stay as they are. A no-op unless a backbone has adapters.

        Args:
            how: if there is plenty of memory, in any case, or not at all, and what was made is given up.
        """

    def peft_adapter(self) -> tuple[PeftConfig, dict[str, Tensor]] | None:
        """Adapter weights under the names they would have in a PEFT folder of the language model.

        Returns:
            (config, weights that share storage with this backbone's), or None when there is no adapter.
        """
        return None
