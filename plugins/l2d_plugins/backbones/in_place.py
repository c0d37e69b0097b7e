"""The in-place backbone of TESS 2: the language model itself reads known and noisy tokens, all at once or in blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from l2d_plugins.twins import Head, cache_name, run_body, twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROVEN = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3", "olmo2", "gpt2", "roberta", "bert")
"""Families that are known to be served."""


class InPlaceConfig(BackboneConfig):
    """A causal or masked language model whose own weights learn to denoise (arXiv:2502.13917, section 3.2).

    Noisy positions enter as embeddings plus a time embedding, known ones as their plain embeddings. Padding is never
    seen; pads that are to be learnt, as the authors do, are tokens like any other (`data.padding`). Layers of a sliding
    window see as far to either side as they were pretrained to see back.

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
    _canvases: list[_Canvas] = field(default_factory=list)

    @override
    def select(self, rows: Tensor) -> InPlaceContext:
        return InPlaceContext(self.embedded[rows], self.known[rows])

    def canvas(self, positions: Tensor, shift: int) -> _Canvas:
        """The canvas of a query, arranged once for all evaluations that ask about the same tensor of positions."""
        if not self._canvases or self._canvases[0].asked is not positions:
            self._canvases[:] = [_Canvas.of(self, positions, shift)]
        return self._canvases[0]


@dataclass(frozen=True)
class _Canvas:
    """Where the positions asked about stand among known tokens, (B, T)."""

    asked: Tensor  # the positions, (B, L), int64
    noisy: Tensor  # bool
    column: Tensor  # which of the L stands there, 0 where none does, int64
    visible: Tensor  # bool
    is_full: bool  # whether everything is visible
    before: Tensor  # whose output speaks about each position asked about, (B, L), int64
    speaks: Tensor  # whether there is one, (B, L), bool

    @classmethod
    def of(cls, context: InPlaceContext, positions: Tensor, shift: int) -> _Canvas:
        rows, length = positions.shape
        more = max(0, int(positions.max()) + 1 - context.known.shape[1])
        known = functional.pad(context.known, (0, more))
        order = torch.arange(length, device=positions.device).expand(rows, -1)
        # Positions may be repeated to fill up a row. Each slot takes one of them, and so does its gradient.
        column = torch.full_like(known, -1, dtype=torch.int64).scatter(1, positions, order)
        noisy, before = column >= 0, (positions - shift).clamp_min(0)
        visible = known | noisy
        speaks = visible.gather(1, before) & (positions >= shift)
        return cls(positions, noisy, column.clamp_min(0), visible, bool(visible.all()), before, speaks)


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
        self._keeps_keys = False
        self._reach: int | None = None  # how far the layers of a sliding window see; None where there are none
        self._is_windowed_throughout = False
        self._needs_no_mask = not is_meta and self._self_test()
        base: Any = lm.base_model
        if not is_meta and getattr(base.config, "sliding_window", None) is not None:
            self._find_window()

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
        if self.lm.device.type != "meta" and not self.sees_later:
            problem = self._problem_with_blocks()
            if problem and size is not None:
                raise self._refusal(problem)
            self._keeps_keys = problem is None and self.is_causal
        return self

    @override
    def table(self) -> Tensor:
        embeddings: Any = self.lm.get_input_embeddings()
        return embeddings.weight  # type: ignore[no-any-return]

    @override
    def read(self, layout: Layout) -> InPlaceContext | BlockContext:
        embedded = self.lm.get_input_embeddings()(layout.tokens)
        # Training reads clean and noisy tokens in one pass: transformers drops a cache where it recomputes activations.
        is_learning = torch.is_grad_enabled() or self.lm.training
        if self.block_size is None:
            # Known tokens in front that see no noise are read once, as in blocks, of which the canvas is the only one.
            reads_once = self._keeps_keys and not is_learning and not bool((layout.blocks > 0).any())
            if not reads_once:
                return InPlaceContext(embedded, layout.blocks == 0)
        context = BlockContext.of(embedded, layout.blocks)
        return context if is_learning else self._read(context, embedded.shape[1])

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
        canvas = context.canvas(positions, self.shift)
        known = functional.pad(context.embedded, (0, 0, 0, canvas.noisy.shape[1] - context.embedded.shape[1]))
        embedded = _take(h, canvas.column).to(mark.dtype) + _take(mark, canvas.column)
        inputs = torch.where(canvas.noisy[..., None], embedded.to(known.dtype), known)
        hidden = self._whole(inputs, canvas.visible, is_full=canvas.is_full)
        return _take(hidden, canvas.before).masked_fill(~canvas.speaks[..., None], 0)

    @property
    @override
    def head(self) -> nn.Module:
        return self._head[0]

    @override
    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        return {"time": list(self.time.parameters())}

    def _whole(self, inputs: Tensor, visible: Tensor, *, is_full: bool = False) -> Tensor:
        """Last hidden states, (B, T, H), every position seeing all visible ones; `is_full` if those are all."""
        allowed = visible[:, None]
        if self.is_causal:
            total = visible.shape[1]
            allowed = allowed & torch.ones(total, total, dtype=torch.bool, device=visible.device).tril()
        places = (visible.cumsum(-1) - 1).clamp_min(0)
        needs_mask = not (is_full and self._needs_no_mask) or self._is_narrow(visible.shape[1])
        return self._run(inputs, allowed if needs_mask else None, places)

    def _beside(self, noisy: Tensor, positions: Tensor, context: BlockContext) -> Tensor:
        """Hidden states about positions whose noisy inputs, (B, L, H), stand beside the clean tokens."""
        beside = Beside.of(context, positions, self.shift)
        edges = beside.slots[:, positions.shape[1] :]
        inputs = torch.cat([noisy.to(context.embedded.dtype), _take(context.embedded, edges)], 1)
        seen, places = beside.seen(context, is_causal=self.is_causal), context.places(beside.slots)
        known = context.embedded.shape[1]
        before = context.places(torch.arange(known, device=positions.device).expand(len(positions), -1))
        if context.keys is None:
            clean = functional.pad(context.seen(known), (0, inputs.shape[1]))
            places = torch.cat([before, places], 1)
            hidden = self._run(torch.cat([context.embedded, inputs], 1), torch.cat([clean, seen], 1), places)[:, known:]
        else:
            hidden = self._run(inputs, seen, places, Reader(context.keys), before)
        return _take(hidden, beside.source.clamp_min(0)).masked_fill(beside.source[..., None] < 0, 0)

    def _read(self, context: BlockContext, count: int) -> BlockContext:
        """The context with keys and values of its last tokens, too."""
        slots = torch.arange(context.embedded.shape[1], device=context.blocks.device)
        places = context.places(slots.expand(len(context.blocks), -1))
        reader = Reader(context.keys)
        self._run(context.embedded[:, -count:], context.seen(count), places[:, -count:], reader, places[:, :-count])
        return replace(context, keys=reader.keys())

    def _run(
        self,
        inputs: Tensor,
        allowed: Tensor | None,
        places: Tensor,
        reader: Reader | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states of inputs that see what is allowed, (B, n or 1, keys), or without a mask everything.

        Inputs stand at `places`, and what the reader has read at those `before`, (B, keys - n).
        """
        body = self._body[0]
        given: dict[str, Any] = {} if reader is None else {cache_name(body): reader}
        if allowed is None:
            body = twin(body, config=_open(body.config))
            if not _is_masked(self.lm.config):  # whose attention tells its kernel so itself
                given["is_causal"] = False
        else:
            keys = places if before is None else torch.cat([before, places], 1)
            given["attention_mask"] = self._masks(allowed, places, keys, inputs.dtype)
        return run_body(body, inputs_embeds=inputs, position_ids=places + self._first_position, **given)

    def _is_narrow(self, keys: int) -> bool:
        """Whether some layers may not see all of so many keys."""
        return self._reach is not None and keys > self._reach + 1

    def _masks(self, allowed: Tensor, places: Tensor, keys: Tensor, dtype: torch.dtype) -> Any:
        """Masks of our own: transformers would make causal ones, or see one where there is padding.

        Layers of a sliding window see as far to either side as they were pretrained to see back, measured in tokens.
        """

        def mask(allowed: Tensor) -> Tensor:
            made = torch.zeros(*allowed.shape, dtype=dtype, device=allowed.device)
            # Finite in every type it may be cast to: a row that sees nothing must not become NaN.
            made = made.masked_fill(~allowed, torch.finfo(torch.float16).min)[:, None]
            return made.expand(-1, -1, places.shape[1], -1)

        if not self._is_narrow(keys.shape[1]):
            return mask(allowed)
        assert self._reach is not None
        near = (places[..., None] - keys[:, None]).abs() <= self._reach
        narrow = mask(allowed & near)
        if self._is_windowed_throughout:
            return narrow
        body: Any = self._body[0]
        wide = mask(allowed)
        return {kind: narrow if kind == "sliding_attention" else wide for kind in body.config.layer_types}

    @torch.no_grad()
    def _find_window(self) -> None:
        """Find out which layers see a window, by what the model itself makes of a short one; refuse what cannot be."""
        body: Any = self._body[0]
        window, short = body.config.sliding_window, copy.copy(body.config)
        short.sliding_window = 2
        places = torch.arange(5, device=self.lm.device)[None]
        embedded = self.lm.get_input_embeddings()(places % self.vocab_size)
        # Models that read both ways count the window to one side without the token itself.
        is_masked = _is_masked(self.lm.config)
        allowed = torch.ones(1, 5, 5, dtype=torch.bool, device=places.device)
        wanted = run_body(twin(body, config=short), inputs_embeds=embedded, position_ids=places + self._first_position)
        found: dict[tuple[int | None, bool], float] = {}
        for reach, throughout in ((None, False), (1 + is_masked, True), (1 + is_masked, False)):
            self._reach, self._is_windowed_throughout = reach, throughout
            try:
                made = self._run(embedded, allowed if is_masked else allowed.tril(), places)
            except (RuntimeError, TypeError, AttributeError, LookupError, ValueError):
                continue
            found[reach, throughout] = float((made - wanted).norm() / wanted.norm())
        (reach, self._is_windowed_throughout), off = min(found.items(), key=lambda item: item[1])
        if not off <= (1e-5 if wanted.dtype == torch.float32 else 0.02):
            raise self._refusal(f"its layers see a window of {window} tokens in a way of their own")
        self._reach = None if reach is None else window - (not is_masked)

    @torch.no_grad()
    def _self_test(self) -> bool:
        """Refuse what cannot be served; whether a canvas without padding needs no mask, which keeps kernels fast."""
        places = torch.arange(5, device=self.lm.device)[None]
        tokens = places % self.vocab_size
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
        if self.is_causal or self.lm.config._attn_implementation != "sdpa":
            return False
        try:
            found = self._run(embedded, None, places)
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError):
            return False
        return bool((found - plain).norm() <= (1e-5 if found.dtype == torch.float32 else 0.02) * plain.norm())

    @torch.no_grad()
    def _problem_with_blocks(self) -> str | None:
        tokens = torch.arange(6, device=self.lm.device)[None] % self.vocab_size
        positions, blocks = torch.arange(2, 6, device=tokens.device)[None], torch.tensor([[0, 0, 1, 1, 2, 2]])
        again = BlockContext.of(self.lm.get_input_embeddings()(tokens), blocks.to(tokens.device))
        noisy = again.embedded[:, 2:].flip(1)
        try:
            cached, wanted = (self._beside(noisy, positions, c).float() for c in (self._read(again, 6), again))
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
            return f"it does not run with a cache ({type(error).__name__}: {error})"
        off = float((cached - wanted).norm() / wanted.norm().clamp_min(1e-12))
        # Half precision loses a percent over tens of layers; a model without a cache is off by as much as it says.
        is_off = not off <= (1e-3 if self.lm.dtype == torch.float32 else 0.1)
        return f"with a cache it says something else, by {off:.1e}; block_size null needs none" if is_off else None

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


def _open(lm_config: Any) -> Any:
    """A config for which transformers makes no mask where none is given, be it causal or of a sliding window."""
    made = copy.copy(lm_config)
    made.is_causal = False
    if getattr(made, "sliding_window", None) is not None:
        made.sliding_window = None
    return made


def _forgotten(lm: PreTrainedModel) -> PreTrainedModel:
    """A model of the same kind, type and kernel with fresh weights."""
    fresh = new_model(type(lm), lm.config, dtype=lm.dtype, attn_implementation=lm.config._attn_implementation)
    return fresh.to(lm.device)  # type: ignore[no-any-return,arg-type]


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Values (B, n, H) at (B, m) places."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
