"""The in-place backbone of TESS 2: a language model that reads known and noisy tokens in one bidirectional pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from typing_extensions import override

from l2d_framework.backbone import Backbone, BackboneConfig
from l2d_framework.errors import ConfigError, UnsupportedModelError
from l2d_framework.opening import new_model
from l2d_framework.types import Layout
from l2d_plugins.families import advice
from l2d_plugins.twins import Head, run_body

PROVEN = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3", "olmo2", "gpt2", "roberta", "bert")
"""Families that are known to be served."""


class InPlaceConfig(BackboneConfig):
    """A causal or masked language model whose own weights learn to denoise (arXiv:2502.13917, section 3.2).

    Noisy positions enter as embeddings plus a time embedding, known ones as their plain embeddings. Padding is never
    seen; pads that are to be learnt, as the authors do, are tokens like any other (`data.padding`).
    """

    name: Literal["in_place"] = "in_place"
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """`causal` is the ablation of the paper's pilot study."""
    initialization: Literal["pretrained", "random"] = "pretrained"
    """`random` forgets the pretrained weights before training: the first column of the paper's Table 1."""
    label_shift: bool | None = None
    """Predict position i from the output at i - 1; None for what the model was pretrained to do."""
    time_bias: bool = False
    """A bias in the time embedding, as TESS 1 has."""

    def check(self, lm_config: Any, block_size: int | None) -> None:
        """Refuse several blocks per sequence and encoder-decoders.

        Args:
            lm_config: the language model's transformers config.
            block_size: tokens denoised together.

        Raises:
            ConfigError: if there is more than one block per sequence.
            UnsupportedModelError: if the model is an encoder-decoder.
        """
        if block_size is not None:
            raise ConfigError(
                f"Backbone 'in_place' denoises one block per sequence; got block_size={block_size}. Set block_size to "
                "null (sampling.block_size still lets an answer grow block by block)"
                + (", or use the backbone 'two_stream'." if block_size == 1 else ".")
            )
        if getattr(lm_config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"Backbone 'in_place' needs one stack of layers; {lm_config.model_type!r} is an encoder-decoder. "
                "Choose a causal or masked language model."
            )

    def build(self, lm: PreTrainedModel) -> InPlace:
        """Wrap a language model and prove by a self-test that first outputs see last inputs.

        Args:
            lm: a causal or masked language model with sdpa or eager attention.

        Returns:
            The backbone.
        """
        return InPlace(self, lm)


@dataclass(frozen=True)
class InPlaceContext:
    """The known tokens of a batch.

    Attributes:
        embedded: their embeddings, of no meaning elsewhere, (B, S, H).
        known: where they stand, (B, S), bool.
    """

    embedded: Tensor
    known: Tensor

    def select(self, rows: Tensor) -> InPlaceContext:
        """Context of some rows; a row may be repeated.

        Args:
            rows: (B',), int64.

        Returns:
            Their context.
        """
        return InPlaceContext(self.embedded[rows], self.known[rows])


class InPlace(Backbone):
    """Module of `InPlaceConfig`.

    Args:
        config: its configuration.
        lm: the language model; its weights are the ones that are trained.
    """

    trains_lm: ClassVar[bool] = True

    config: InPlaceConfig

    def __init__(self, config: InPlaceConfig, lm: PreTrainedModel) -> None:
        super().__init__()
        # Whoever loads this model again must not forget what it has learnt.
        self.config = config.model_copy(update={"initialization": "pretrained"})
        is_meta = lm.device.type == "meta"
        if config.initialization == "random" and not is_meta:
            lm = _forgotten(lm)
        self.lm = lm.eval()
        self.sees_later = config.attention == "bidirectional"
        masked = lm.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        self.shift = int(not masked if config.label_shift is None else config.label_shift)
        self.vocab_size, self.hidden_size = self.table().shape
        self._body: tuple[nn.Module, ...] = (lm.base_model,)  # a tuple, so that no parameter is registered twice
        self._head = (Head(lm, lm.base_model_prefix),)
        # Learned positions of the RoBERTa family start after the one kept for padding.
        embeddings = getattr(lm.base_model, "embeddings", None)
        self._first_position = int(getattr(embeddings, "padding_idx", -1)) + 1 if masked else 0
        self.time = nn.Linear(1, self.hidden_size, bias=config.time_bias)
        nn.init.normal_(self.time.weight, std=getattr(lm.config, "initializer_range", 0.02))
        if config.time_bias:
            nn.init.zeros_(self.time.bias)
        if config.num_classes:
            # The last row stands for no class.
            self.classes = nn.Embedding(config.num_classes + 1, self.hidden_size)
            nn.init.zeros_(self.classes.weight)
        if not is_meta:
            self._self_test()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass; setting it switches the language model."""
        for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
            if hasattr(self.lm, name):
                return bool(getattr(self.lm, name))
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        lm: Any = self.lm
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        disable = getattr(lm, "activation_checkpointing_disable", None) or lm.gradient_checkpointing_disable
        if wanted:
            enable({"use_reentrant": False})
        else:
            disable()

    def table(self) -> Tensor:
        """The input embedding table.

        Returns:
            (V, H).
        """
        embeddings: Any = self.lm.get_input_embeddings()
        return embeddings.weight  # type: ignore[no-any-return]

    def read(self, layout: Layout) -> InPlaceContext:
        """Embed the known tokens.

        Args:
            layout: tokens and blocks, (B, S); only block 0 is known.

        Returns:
            The context.
        """
        return InPlaceContext(self.lm.get_input_embeddings()(layout.tokens), layout.blocks == 0)

    def extend(self, context: InPlaceContext, tokens: Tensor) -> InPlaceContext:
        """Append known tokens.

        Args:
            context: what `read` or `extend` returned.
            tokens: (B, N), int64.

        Returns:
            The longer context.
        """
        embedded = torch.cat([context.embedded, self.lm.get_input_embeddings()(tokens)], 1)
        return InPlaceContext(embedded, functional.pad(context.known, (0, tokens.shape[1]), value=True))

    def features(
        self,
        h: Tensor,
        t: Tensor,
        positions: Tensor,
        context: InPlaceContext,
        condition: Tensor | None,
        *,
        shared_time: float | None = None,
    ) -> Tensor:
        """Outputs of the language model over known and noisy tokens together.

        Args:
            h: embedded noisy states, (B, L, H).
            t: times, (B, L), float32; the time embedding reads 1 - t.
            positions: slots asked about, (B, L), int64, inside the context or after it.
            context: what `read` or `extend` returned.
            condition: class per position, (B, L), int64; None or -1 is unconditional.
            shared_time: not used.

        Returns:
            (B, L, H); zero for the first token under a label shift, about which no output speaks.
        """
        rows, length = positions.shape
        context = _long_enough(context, int(positions.max()) + 1)
        total = context.known.shape[1]
        order = torch.arange(length, device=positions.device).expand(rows, -1)
        # Positions may be repeated to fill up a row. Each slot takes one of them, and so does its gradient.
        column = positions.new_full((rows, total), -1).scatter(1, positions, order)
        noisy, column = column >= 0, column.clamp_min(0)
        mark = self.time((1 - t)[..., None].to(self.time.weight.dtype))
        if self.config.num_classes:
            label = torch.full_like(positions, -1) if condition is None else condition
            mark = mark + self.classes(torch.where(label < 0, self.config.num_classes, label))
        embedded = _take(h, column).to(mark.dtype) + _take(mark, column)
        inputs = torch.where(noisy[..., None], embedded.to(context.embedded.dtype), context.embedded)
        visible = context.known | noisy
        hidden = self._run(inputs, visible)
        before = (positions - self.shift).clamp_min(0)
        speaks = visible.gather(1, before) & (positions >= self.shift)
        return _take(hidden, before).masked_fill(~speaks[..., None], 0)

    @property
    @override
    def head(self) -> nn.Module:
        return self._head[0]

    @override
    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        return {"time": list(self.time.parameters())}

    def _run(self, inputs: Tensor, visible: Tensor) -> Tensor:
        """Last hidden states, (B, T, H), every position seeing all visible ones."""
        total = visible.shape[1]
        allowed = visible[:, None, None, :]
        if self.config.attention == "causal":
            allowed = allowed & torch.ones(total, total, dtype=torch.bool, device=visible.device).tril()
        mask = torch.zeros(len(visible), 1, total, total, dtype=inputs.dtype, device=inputs.device)
        # A mask of our own: transformers would make a causal one, or see one where there is padding.
        # Finite in every type it may be cast to: a row that sees nothing must not become NaN.
        mask = mask.masked_fill(~allowed, torch.finfo(torch.float16).min)
        position_ids = (visible.cumsum(-1) - 1).clamp_min(0) + self._first_position
        return run_body(self._body[0], inputs_embeds=inputs, attention_mask=mask, position_ids=position_ids)

    @torch.no_grad()
    def _self_test(self) -> None:
        tokens = torch.arange(5, device=self.lm.device)[None] % self.vocab_size
        seen = torch.ones_like(tokens, dtype=torch.bool)
        embedded = self.lm.get_input_embeddings()(tokens)
        first, last = embedded.clone(), embedded.clone()
        first[:, 0] += 1
        last[:, -1] += 1
        plain, after_first, after_last = (self._run(e, seen) for e in (embedded, first, last))
        sees_later = not torch.equal(plain[:, 0], after_last[:, 0])
        problem = (
            "its embedding layer does more than look up rows"
            if not torch.equal(embedded, self.table()[tokens])
            else "its last output does not see the first input"
            if torch.equal(plain[:, -1], after_first[:, -1])
            else f"its attention is {'bidirectional' if sees_later else 'causal'} whatever the mask says"
            if sees_later != self.sees_later
            else None
        )
        if problem:
            raise UnsupportedModelError(
                f"Backbone 'in_place' cannot serve {type(self.lm).__name__}: {problem}. "
                f"{advice(self.lm.config.model_type, PROVEN)}"
            )


def _forgotten(lm: PreTrainedModel) -> PreTrainedModel:
    """A model of the same kind, type and kernel with fresh weights."""
    fresh = new_model(type(lm), lm.config, dtype=lm.dtype, attn_implementation=lm.config._attn_implementation)
    return fresh.to(lm.device)  # type: ignore[no-any-return,arg-type]


def _long_enough(context: InPlaceContext, total: int) -> InPlaceContext:
    more = max(0, total - context.known.shape[1])
    return replace(
        context,
        embedded=functional.pad(context.embedded, (0, 0, 0, more)),
        known=functional.pad(context.known, (0, more)),
    )


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Values (B, n, H) at (B, m) places."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
