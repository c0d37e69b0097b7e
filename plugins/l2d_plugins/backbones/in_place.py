"""The in-place backbone of TESS 2: the language model itself reads known and noisy tokens, all at once or in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from l2d_framework.backbone import Backbone, BackboneConfig
from l2d_framework.errors import ConfigError, UnsupportedModelError
from l2d_framework.opening import new_model
from l2d_framework.types import Context, Layout
from l2d_plugins.backbones.blocks import Beside, BlockContext, Reader
from l2d_plugins.families import advice
from l2d_plugins.twins import Head, cache_name, run_body

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROVEN = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3", "olmo2", "gpt2", "roberta", "bert")
"""Families that are known to be served."""


class InPlaceConfig(BackboneConfig):
    """A causal or masked language model whose own weights learn to denoise (arXiv:2502.13917, section 3.2).

    Noisy positions enter as embeddings plus a time embedding, known ones as their plain embeddings. Padding is never
    seen; pads that are to be learnt, as the authors do, are tokens like any other (`data.padding`).

    With `block_size` null, known and noisy tokens see each other, and every evaluation reads all of them. With a number
    the text grows in blocks (arXiv:2503.09573): known tokens see earlier ones, so that each is read once; noisy
    ones see those before their block and all of the block.
    """

    name: Literal["in_place"] = "in_place"
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """`causal` is the ablation of the paper's pilot study; in blocks only noisy tokens look ahead."""
    initialization: Literal["pretrained", "random"] = "pretrained"
    """`random` forgets the pretrained weights before training: the first column of the paper's Table 1."""
    label_shift: bool | None = None
    """Predict position i from the output at i - 1; None for what the model was pretrained to do."""
    time_bias: bool = False
    """A bias in the time embedding, as TESS 1 has."""

    def shifts(self, lm_config: Any) -> bool:
        """Whether position i is predicted from the output at i - 1, as chosen or as in pretraining."""
        return not _is_masked(lm_config) if self.label_shift is None else self.label_shift

    @override
    def check(self, lm_config: Any, block_size: int | None) -> None:
        if getattr(lm_config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"Backbone 'in_place' needs one stack of layers; {lm_config.model_type!r} is an encoder-decoder. "
                "Choose a causal or masked language model."
            )
        if block_size == 1 and self.attention == "causal" and self.shifts(lm_config):
            raise ConfigError(
                "Backbone 'in_place' with attention: causal predicts a token from what comes before it, so with "
                "block_size=1 its noise would go unseen. Set attention to bidirectional or block_size to 2 or more, "
                "or use the backbone 'two_stream'."
            )

    @override
    def build(self, lm: PreTrainedModel) -> InPlace:
        return InPlace(self, lm)


@dataclass(frozen=True)
class InPlaceContext(Context):
    """The known tokens of a batch whose noisy ones are one block."""

    embedded: Tensor  # their embeddings, of no meaning elsewhere, (B, S, H)
    known: Tensor  # where they stand, (B, S), bool

    @override
    def select(self, rows: Tensor) -> InPlaceContext:
        return InPlaceContext(self.embedded[rows], self.known[rows])


class InPlace(Backbone[InPlaceContext | BlockContext]):
    """Module of `InPlaceConfig`."""

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
        self.is_causal = config.attention == "causal"
        self.sees_later = not self.is_causal
        masked = _is_masked(lm.config)
        self.shift = int(config.shifts(lm.config))
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
        return bool(getattr(self.lm, f"is_{_recomputation(self.lm)}", False))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        if wanted:
            getattr(self.lm, f"{_recomputation(self.lm)}_enable")({"use_reentrant": False})
        else:
            getattr(self.lm, f"{_recomputation(self.lm)}_disable")()

    @override
    def in_blocks(self, size: int | None) -> Self:
        super().in_blocks(size)
        self.sees_later = size is None and not self.is_causal
        if size is not None and self.lm.device.type != "meta":
            self._self_test_of_blocks()
        return self

    @override
    def table(self) -> Tensor:
        embeddings: Any = self.lm.get_input_embeddings()
        return embeddings.weight  # type: ignore[no-any-return]

    @override
    def read(self, layout: Layout) -> InPlaceContext | BlockContext:
        embedded = self.lm.get_input_embeddings()(layout.tokens)
        if self.block_size is None:
            return InPlaceContext(embedded, layout.blocks == 0)
        context = BlockContext.of(embedded, layout.blocks)
        # Training reads clean and noisy tokens in one pass: transformers drops a cache where it recomputes activations.
        return context if torch.is_grad_enabled() or self.lm.training else self._read(context, embedded.shape[1])

    @override
    def extend(self, context: InPlaceContext | BlockContext, tokens: Tensor) -> InPlaceContext | BlockContext:
        more, count = self.lm.get_input_embeddings()(tokens), tokens.shape[1]
        if isinstance(context, BlockContext):
            longer = context.longer(more)
            return longer if context.keys is None else self._read(longer, count)
        embedded = torch.cat([context.embedded, more], 1)
        return InPlaceContext(embedded, functional.pad(context.known, (0, count), value=True))

    @override
    def features(
        self,
        h: Tensor,
        t: Tensor,
        positions: Tensor,
        context: InPlaceContext | BlockContext,
        condition: Tensor | None,
        *,
        shared_time: float | None = None,
    ) -> Tensor:
        # Zero for the first token under a label shift, about which no output speaks.
        mark = self.time((1 - t)[..., None].to(self.time.weight.dtype))
        if self.config.num_classes:
            label = torch.full_like(positions, -1) if condition is None else condition
            mark = mark + self.classes(torch.where(label < 0, self.config.num_classes, label))
        if isinstance(context, BlockContext):
            return self._beside(h.to(mark.dtype) + mark, positions, context)
        rows, length = positions.shape
        context = _long_enough(context, int(positions.max()) + 1)
        total = context.known.shape[1]
        order = torch.arange(length, device=positions.device).expand(rows, -1)
        # Positions may be repeated to fill up a row. Each slot takes one of them, and so does its gradient.
        column = positions.new_full((rows, total), -1).scatter(1, positions, order)
        noisy, column = column >= 0, column.clamp_min(0)
        embedded = _take(h, column).to(mark.dtype) + _take(mark, column)
        inputs = torch.where(noisy[..., None], embedded.to(context.embedded.dtype), context.embedded)
        visible = context.known | noisy
        hidden = self._whole(inputs, visible)
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

    def _whole(self, inputs: Tensor, visible: Tensor) -> Tensor:
        """Last hidden states, (B, T, H), every position seeing all visible ones."""
        total = visible.shape[1]
        allowed = visible[:, None]
        if self.is_causal:
            allowed = allowed & torch.ones(total, total, dtype=torch.bool, device=visible.device).tril()
        return self._run(inputs, allowed.expand(-1, total, -1), (visible.cumsum(-1) - 1).clamp_min(0))

    def _beside(self, noisy: Tensor, positions: Tensor, context: BlockContext) -> Tensor:
        """Hidden states about positions whose noisy inputs, (B, L, H), stand beside the clean tokens."""
        beside = Beside.of(context, positions, self.shift)
        edges = beside.slots[:, positions.shape[1] :]
        inputs = torch.cat([noisy.to(context.embedded.dtype), _take(context.embedded, edges)], 1)
        seen, places = beside.seen(context, is_causal=self.is_causal), context.places(beside.slots)
        if context.keys is None:
            known = context.embedded.shape[1]
            clean = functional.pad(context.seen(known), (0, inputs.shape[1]))
            slots = torch.arange(known, device=positions.device).expand(len(positions), -1)
            places = torch.cat([context.places(slots), places], 1)
            hidden = self._run(torch.cat([context.embedded, inputs], 1), torch.cat([clean, seen], 1), places)[:, known:]
        else:
            hidden = self._run(inputs, seen, places, Reader(context.keys))
        return _take(hidden, beside.source.clamp_min(0)).masked_fill(beside.source[..., None] < 0, 0)

    def _read(self, context: BlockContext, count: int) -> BlockContext:
        """The context with keys and values of its last tokens, too."""
        slots = torch.arange(context.embedded.shape[1], device=context.blocks.device)[-count:]
        places = context.places(slots.expand(len(context.blocks), -1))
        reader = Reader(context.keys)
        self._run(context.embedded[:, -count:], context.seen(count), places, reader)
        return replace(context, keys=reader.keys())

    def _run(self, inputs: Tensor, allowed: Tensor, places: Tensor, reader: Reader | None = None) -> Tensor:
        """Last hidden states of inputs that see what is allowed, (B, n, keys)."""
        mask = torch.zeros(*allowed.shape, dtype=inputs.dtype, device=inputs.device)
        # A mask of our own: transformers would make a causal one, or see one where there is padding.
        # Finite in every type it may be cast to: a row that sees nothing must not become NaN.
        mask = mask.masked_fill(~allowed, torch.finfo(torch.float16).min)[:, None]
        given = {} if reader is None else {cache_name(self._body[0]): reader}
        places = places + self._first_position
        return run_body(self._body[0], inputs_embeds=inputs, attention_mask=mask, position_ids=places, **given)

    @torch.no_grad()
    def _self_test(self) -> None:
        tokens = torch.arange(5, device=self.lm.device)[None] % self.vocab_size
        seen = torch.ones_like(tokens, dtype=torch.bool)
        embedded = self.lm.get_input_embeddings()(tokens)
        first, last = embedded.clone(), embedded.clone()
        first[:, 0] += 1
        last[:, -1] += 1
        plain, after_first, after_last = (self._whole(e, seen) for e in (embedded, first, last))
        sees_later = not torch.equal(plain[:, 0], after_last[:, 0])
        problem = (
            "its embedding layer does more than look up rows"
            if not torch.equal(embedded, self.table()[tokens])
            else "its last output does not see the first input"
            if torch.equal(plain[:, -1], after_first[:, -1])
            else f"its attention is {'bidirectional' if sees_later else 'causal'} whatever the mask says"
            if sees_later == self.is_causal
            else None
        )
        if problem:
            raise self._refusal(problem)

    @torch.no_grad()
    def _self_test_of_blocks(self) -> None:
        tokens = torch.arange(6, device=self.lm.device)[None] % self.vocab_size
        positions, blocks = torch.arange(2, 6, device=tokens.device)[None], torch.tensor([[0, 0, 1, 1, 2, 2]])
        again = BlockContext.of(self.lm.get_input_embeddings()(tokens), blocks.to(tokens.device))
        noisy = again.embedded[:, 2:].flip(1)
        try:
            cached, wanted = (self._beside(noisy, positions, c).float() for c in (self._read(again, 6), again))
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
            raise self._refusal(f"it does not run with a cache ({type(error).__name__}: {error})") from error
        off = float((cached - wanted).norm() / wanted.norm().clamp_min(1e-12))
        # Half precision loses a percent over tens of layers; a model without a cache is off by as much as it says.
        if not off <= (1e-3 if self.lm.dtype == torch.float32 else 0.1):
            raise self._refusal(f"with a cache it says something else, by {off:.1e}; block_size null needs none")

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"Backbone 'in_place' cannot serve {type(self.lm).__name__}: {why}. "
            f"{advice(self.lm.config.model_type, PROVEN)}"
        )


def _is_masked(lm_config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return lm_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _recomputation(lm: PreTrainedModel) -> str:
    """What this release of transformers calls it."""
    return "activation_checkpointing" if hasattr(lm, "activation_checkpointing_enable") else "gradient_checkpointing"


def _forgotten(lm: PreTrainedModel) -> PreTrainedModel:
    """A model of the same kind, type and kernel with fresh weights."""
    fresh = new_model(type(lm), lm.config, dtype=lm.dtype, attn_implementation=lm.config._attn_implementation)
    return fresh.to(lm.device)  # type: ignore[no-any-return,arg-type]


def _long_enough(context: InPlaceContext, total: int) -> InPlaceContext:
    more = max(0, total - context.known.shape[1])
    embedded = functional.pad(context.embedded, (0, 0, 0, more))
    return InPlaceContext(embedded, functional.pad(context.known, (0, more)))


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Values (B, n, H) at (B, m) places."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
