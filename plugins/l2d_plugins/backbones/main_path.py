"""The frozen language model as the two-stream backbone uses it: keys, values and hidden states before the last norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer
from typing_extensions import override

from l2d_framework.errors import UnsupportedModelError
from l2d_framework.types import Context, Layout
from l2d_plugins.backbones.branches import Branch, find_branches, is_norm
from l2d_plugins.backbones.shadow import MainKeys, gather_kwargs
from l2d_plugins.families import advice
from l2d_plugins.twins import Head, StandIn, cache_name, private

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROVEN = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "smollm3", "phi3", "olmo2")
"""Families that are promised to be served."""

_SELF_TEST_TOKENS = 7
_FAILURES = (RuntimeError, TypeError, AttributeError, LookupError, ValueError)
"""How code fails that is not built as expected."""


@dataclass(frozen=True)
class MainContext(Context):
    """What the main path remembers.

    Attributes:
        cache: keys and values of all tokens.
        hidden: hidden states before the final norm of the last chunk read, (B, n, H).
        kwargs: what the model passed to each layer for that chunk, with the read-only cache in place of its own.
        present: where real tokens stand, (B, T), bool; None when nothing is padded on the left.
        real: number of real tokens per row, (B,), int64.
        length: T, tokens in the cache, padding included.
        tables: modulation by time, filled as times are first used; shared by all contexts grown from one `read`.
    """

    cache: DynamicCache
    hidden: Tensor
    kwargs: list[dict[str, Any]]
    present: Tensor | None
    real: Tensor
    length: int
    tables: dict[float, Any] = field(default_factory=dict)

    @property
    def filled(self) -> int:
        """How many slots are filled, padding included."""
        return self.length

    def index(self, positions: Tensor) -> Tensor:
        """Where in the last chunk the input just before each position stands, (B, L)."""
        return positions - 1 - (self.length - self.hidden.shape[1])

    def hidden_at(self, positions: Tensor) -> Tensor:
        """Main hidden states from which the positions are predicted, (B, L, H)."""
        if self.hidden.shape[1] == 1:
            return self.hidden.expand(-1, positions.shape[1], -1)
        index = self.index(positions)[..., None]
        return self.hidden.gather(1, index.expand(-1, -1, self.hidden.shape[-1]))

    @override
    def select(self, rows: Tensor) -> Self:
        return self._select(rows, _changed(self.cache, lambda values: values[rows]))

    def _select(self, rows: Tensor, cache: DynamicCache, **changes: Any) -> Self:
        batch = self.hidden.shape[0]
        # Layers share what they are given, and share what is made of it.
        values = {id(value): value for kwargs in self.kwargs for value in kwargs.values()}
        keys = MainKeys(cache)
        chosen = {key: keys if isinstance(v, MainKeys) else _pick(v, rows, batch) for key, v in values.items()}
        return replace(
            self,
            cache=cache,
            hidden=self.hidden[rows],
            kwargs=[{name: chosen[id(value)] for name, value in kwargs.items()} for kwargs in self.kwargs],
            present=None if self.present is None else self.present[rows],
            real=self.real[rows],
            **changes,
        )


@dataclass(frozen=True)
class FixedContext(MainContext):
    """What the main path remembers, in buffers that grow no more: `length` is how many slots they have.

    Attributes:
        slot: where the next token goes, (1,), int64.
    """

    slot: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @classmethod
    def of(cls, context: MainContext, slots: int) -> FixedContext:
        """A copy of a context with so many slots."""
        room = slots - context.length
        present = torch.ones_like(context.real[:, None], dtype=torch.bool).expand(-1, context.length)
        if isinstance(context, FixedContext):
            slot = context.slot.clone()
        else:
            slot = torch.full((1,), context.length, dtype=torch.int64, device=context.real.device)
        return cls(
            cache=_changed(context.cache, lambda values: functional.pad(values, (0, 0, 0, room)), slot),
            hidden=context.hidden[:, :0],
            kwargs=[],
            present=functional.pad(present if context.present is None else context.present, (0, room)),
            real=context.real.clone(),
            length=slots,
            tables=context.tables,
            slot=slot,
        )

    @property
    @override
    def filled(self) -> int:
        return int(self.slot)

    @override
    def index(self, positions: Tensor) -> Tensor:
        return torch.zeros_like(positions)

    @override
    def select(self, rows: Tensor) -> Self:
        slot = self.slot.clone()
        return self._select(rows, _changed(self.cache, lambda values: values[rows], slot), slot=slot)


class _Slots(DynamicLayer):
    """Keys and values of one layer in buffers of a fixed size."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of transformers
        self.lazy_initialization(keys, values)
        self.keys, self.values, self._buffers, self._slot = keys, values, (keys, values), slot

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put those of one token in its slot."""
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self._slot, new)
        return self._buffers


def _changed(cache: DynamicCache, change: Callable[[Tensor], Tensor], slot: Tensor | None = None) -> DynamicCache:
    """Changed copies of keys and values, in buffers of a fixed size if there is a slot for the next token."""
    changed = DynamicCache()
    layers: list[Any] = cache.layers
    for layer in layers:
        keys, values = change(layer.keys), change(layer.values)
        if slot is not None:
            changed.layers.append(_Slots(keys, values, slot))
            continue
        changed.layers.append(_layer(keys, values))
    return changed


def _layer(keys: Tensor, values: Tensor) -> Any:
    layer: Any = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _last(values: Tensor, filled: int, slots: int) -> Tensor:
    """The last of the filled slots, (..., slots, d), behind zeros where there are fewer."""
    values = values[..., max(0, filled - slots) : filled, :]
    return functional.pad(values, (0, 0, slots - values.shape[-2], 0))


def _pick(value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_pick(part, rows, batch) for part in value)
    return value[rows] if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch else value


class MainPath:
    """Runs a language model without changing it and finds the parts the diffusion path needs.

    It is one whose decoder has a list `layers` and one final norm, and whose attention kernel takes an explicit mask.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        kernel = lm.config._attn_implementation
        if kernel not in ("sdpa", "eager"):
            raise UnsupportedModelError(
                f"Backbone 'two_stream' needs attention masks per query; {kernel!r} takes none. "
                "Set model.attn_implementation to 'sdpa' or 'eager'."
            )
        self.decoder = lm.get_decoder()
        layers = getattr(self.decoder, "layers", None)
        norms = [m for m in self.decoder.children() if is_norm(m)] if layers is not None else []
        name = next((n for n, child in lm.named_children() if child is self.decoder), None)
        if layers is None or len(norms) != 1 or name is None:
            raise self._refusal(
                "its decoder needs a list `layers` and exactly one final norm "
                f"(found layers: {layers is not None}, norms: {len(norms)})"
            )
        self.layers: nn.ModuleList = layers
        self._cache_name = cache_name(self.decoder)
        self.layers_name = next(n for n, module in lm.named_modules() if module is layers)
        self.final_norm = norms[0]
        self._norm_name = next(n for n, child in self.decoder.named_children() if child is norms[0])
        self.head = Head(lm, name, self.final_norm)

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"Backbone 'two_stream' cannot serve {type(self.lm).__name__}: {why}. "
            f"{advice(self.lm.config.model_type, PROVEN)}"
        )

    def find_branches(self) -> list[tuple[Branch, Branch]]:
        """(attention, MLP) branch of every layer, from one forward pass over two tokens."""
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.lm.device)
        # One stands for all that are built alike; a pass through a deep model takes long where there are no weights.
        kinds = [str(layer) for layer in self.layers]
        first = {kind: self.layers[kinds.index(kind)] for kind in kinds}
        decoder: Any = self.decoder
        decoder.layers = nn.ModuleList(first.values())
        with torch.no_grad():
            # Without a cache transformers looks for packed sequences, which needs values that the meta device has not.
            cache = DynamicCache()
            try:
                found = find_branches(
                    decoder.layers,
                    lambda: decoder(input_ids=tokens, **{self._cache_name: cache}),
                    advice(self.lm.config.model_type, PROVEN),
                )
            except UnsupportedModelError:
                raise
            except _FAILURES as error:
                raise self._refusal(f"it cannot be run on two tokens ({type(error).__name__}: {error})") from error
            finally:
                decoder.layers = self.layers
        branches = dict(zip(first, found, strict=True))
        return [branches[kind] for kind in kinds]

    def read(self, layout: Layout) -> MainContext:
        """Run over a batch of prompts; rows padded on the left or nothing but padding, or all rows on the right."""
        present = layout.present
        # Right padding is invisible to causal attention; a mask would only be in the way of faster kernels.
        left = bool(((present[:, 1:] & ~present[:, :-1]).any(-1) | ~present.any(-1)).any())
        position_ids = (present.cumsum(-1) - 1).clamp_min(0)
        return self._read(DynamicCache(), layout.tokens, present if left else None, position_ids, present.sum(-1), {})

    def extend(self, context: MainContext, tokens: Tensor) -> MainContext:
        """Run over further tokens, (B, N)."""
        if isinstance(context, FixedContext):
            return self._fill(context, tokens)
        count = tokens.shape[1]
        present = context.present
        if present is not None:
            present = torch.cat([present, present.new_ones(present.shape[0], count)], 1)
        position_ids = context.real[:, None] + torch.arange(count, device=tokens.device)
        return self._read(context.cache, tokens, present, position_ids, context.real + count, context.tables)

    def fixed(self, context: MainContext, slots: int, most: int) -> FixedContext | None:
        """A copy of a context with so many slots; None where some layer would not see all of `most`."""
        window = getattr(self.lm.config, "sliding_window", None)
        return None if window is not None and window < most else FixedContext.of(context, slots)

    def _fill(self, context: FixedContext, token: Tensor) -> FixedContext:
        present = context.present
        assert present is not None
        present.index_fill_(1, context.slot, True)
        mask = present[:, None, None]
        if self.lm.config._attn_implementation == "eager":
            dtype = self.lm.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        position_ids = context.real[:, None].clone()
        hidden, kwargs = self._run(context.cache, token, mask, position_ids)
        context.slot.add_(1)
        context.real.add_(1)
        return replace(context, hidden=hidden, kwargs=kwargs)

    def rewind(self, context: MainContext, counts: Tensor) -> MainContext:
        """Take back the last tokens of every row, so many of each, (B,)."""
        least = int(counts.min())
        length, present = context.length - least, context.present
        source = torch.arange(length, device=counts.device) - (counts - least)[:, None]
        if present is not None or bool((counts > least).any()):
            old = torch.ones_like(source, dtype=torch.bool) if present is None else present
            present = old.gather(1, source.clamp_min(0)) & (source >= 0)
        is_even = bool((counts == least).all())
        index = source.clamp_min(0)[:, None, :, None]

        def moved(values: Tensor) -> Tensor:
            if is_even:
                return values[:, :, :length]
            return values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3]))

        cache = _changed(context.cache, moved)
        return replace(
            context,
            cache=cache,
            hidden=context.hidden[:, :0],
            kwargs=[],
            present=present,
            real=context.real - counts,
            length=length,
        )

    def join(self, contexts: Sequence[MainContext], slots: int) -> MainContext:
        """The rows of several contexts, with so many slots."""
        first = contexts[0]
        cache, real = DynamicCache(), torch.cat([context.real for context in contexts])
        for layers in zip(*(context.cache.layers for context in contexts), strict=True):
            pairs: list[Any] = [*zip(layers, contexts, strict=True)]
            keys = torch.cat([_last(layer.keys, context.filled, slots) for layer, context in pairs])
            values = torch.cat([_last(layer.values, context.filled, slots) for layer, context in pairs])
            cache.layers.append(_layer(keys, values))
        present = real[:, None] > torch.arange(slots, device=real.device).flip(0)
        hidden = first.hidden.new_zeros(len(real), 0, first.hidden.shape[-1])
        return MainContext(cache, hidden, [], None if bool(present.all()) else present, real, slots, first.tables)

    def _read(
        self,
        cache: DynamicCache,
        tokens: Tensor,
        present: Tensor | None,
        position_ids: Tensor,
        real: Tensor,
        tables: dict[float, Any],
    ) -> MainContext:
        hidden, kwargs = self._run(cache, tokens, None if present is None else present.long(), position_ids)
        return MainContext(cache, hidden, kwargs, present, real, cache.get_seq_length(), tables)

    def _run(
        self, cache: DynamicCache, tokens: Tensor, mask: Tensor | None, position_ids: Tensor
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states before the last norm, and what each layer was given."""
        kwargs: list[dict[str, Any]] = []
        hidden: list[Tensor] = []
        keys = MainKeys(cache)

        def watched(layer: nn.Module) -> StandIn:
            def call(*args: Any, **given: Any) -> Any:
                # Whatever a layer calls its cache, there a shadow takes the read-only one.
                kwargs.append({name: keys if value is cache else value for name, value in given.items()})
                return layer(*args, **given)

            return StandIn(layer, call)

        def norm(y: Tensor) -> Tensor:
            hidden.append(y)
            return self.final_norm(y)  # type: ignore[no-any-return]

        decoder = private(
            self.decoder,
            layers=[watched(layer) for layer in self.layers],
            **{self._norm_name: StandIn(self.final_norm, norm)},
        )
        with torch.no_grad():
            decoder(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=True,
                **{self._cache_name: cache},
            )
        return hidden[0], kwargs

    def self_test(self, shadows: nn.ModuleList) -> None:
        """Replay the main path's hidden states through bare shadows; UnsupportedModelError if they do not come out."""
        device = self.lm.device
        tokens = torch.arange(2 * _SELF_TEST_TOKENS, device=device).reshape(2, -1) % self.lm.config.vocab_size
        blocks = torch.zeros_like(tokens)
        blocks[1, :2] = -1
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inputs.append(args[0])
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            context = self.read(Layout(tokens, blocks))
        except _FAILURES as error:
            raise self._refusal(
                f"it cannot be read with a cache of its own ({type(error).__name__}: {error})"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        everywhere = torch.arange(_SELF_TEST_TOKENS, device=device).expand(2, -1)
        tolerance = 1e-4 if self.lm.dtype == torch.float32 else 5e-2
        for number, shadow in enumerate(shadows):
            arguments = gather_kwargs(context.kwargs[number], everywhere, context.length)
            try:
                with torch.no_grad():
                    replay = shadow(inputs[number], **arguments)
            except _FAILURES as error:
                raise self._refusal(
                    f"layer {number} cannot be replayed on the main path's keys and values "
                    f"({type(error).__name__}: {error})"
                ) from error
            replay = replay[0] if isinstance(replay, tuple) else replay
            real = blocks >= 0
            wanted = outputs[number][real].float()
            off = float((replay[real].float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
            if not off <= tolerance:
                raise self._refusal(
                    f"layer {number} replayed on the main path's keys and values is off by {off:.1e} "
                    f"(at most {tolerance:.0e} is rounding)"
                )
