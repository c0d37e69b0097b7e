"""The frozen language model as the two-stream backbone uses it: keys, values and hidden states before the last norm."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from typing_extensions import override

from l2d_framework.errors import UnsupportedModelError
from l2d_framework.types import Context, Layout
from l2d_plugins.backbones.branches import Branch, find_branches, is_norm
from l2d_plugins.backbones.shadow import MainKeys, gather_kwargs
from l2d_plugins.families import advice
from l2d_plugins.twins import Head, StandIn, cache_name, private

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

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

    def index(self, positions: Tensor) -> Tensor:
        """Where in the last chunk the input just before each position stands.

        Args:
            positions: slots asked about, (B, L).

        Returns:
            (B, L), int64.
        """
        return positions - 1 - (self.length - self.hidden.shape[1])

    def hidden_at(self, positions: Tensor) -> Tensor:
        """Main hidden states from which the positions are predicted.

        Args:
            positions: slots asked about, (B, L).

        Returns:
            (B, L, H).
        """
        if self.hidden.shape[1] == 1:
            return self.hidden.expand(-1, positions.shape[1], -1)
        index = self.index(positions)[..., None]
        return self.hidden.gather(1, index.expand(-1, -1, self.hidden.shape[-1]))

    @override
    def select(self, rows: Tensor) -> MainContext:
        batch = self.hidden.shape[0]
        cache = transformers.DynamicCache()
        layers: list[Any] = self.cache.layers
        for number, layer in enumerate(layers):
            cache.update(layer.keys[rows], layer.values[rows], number)
        keys = MainKeys(cache)
        return replace(
            self,
            cache=cache,
            hidden=self.hidden[rows],
            kwargs=[
                {name: keys if isinstance(v, MainKeys) else _pick(v, rows, batch) for name, v in kwargs.items()}
                for kwargs in self.kwargs
            ],
            present=None if self.present is None else self.present[rows],
            real=self.real[rows],
        )


def _pick(value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_pick(part, rows, batch) for part in value)
    return value[rows] if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch else value


class MainPath:
    """Runs a language model without changing it and finds the parts the diffusion path needs.

    Args:
        lm: a causal language model whose decoder has a list `layers` and one final norm.

    Raises:
        UnsupportedModelError: if the model is built otherwise or its attention kernel takes no explicit mask.
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
        """Residual branches of every layer, from one forward pass over two tokens.

        Returns:
            (attention, MLP) per layer.

        Raises:
            UnsupportedModelError: if the model cannot be run as transformers' decoders are.
        """
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.lm.device)
        with torch.no_grad():
            # Without a cache transformers looks for packed sequences, which needs values that the meta device has not.
            cache = transformers.DynamicCache()
            try:
                return find_branches(
                    self.layers,
                    lambda: self.decoder(input_ids=tokens, **{self._cache_name: cache}),
                    advice(self.lm.config.model_type, PROVEN),
                )
            except UnsupportedModelError:
                raise
            except _FAILURES as error:
                raise self._refusal(f"it cannot be run on two tokens ({type(error).__name__}: {error})") from error

    def read(self, layout: Layout) -> MainContext:
        """Run over a batch of prompts.

        Args:
            layout: tokens and blocks, (B, S); rows padded on the left, or all rows on the right.

        Returns:
            The context.
        """
        present = layout.present
        # Right padding is invisible to causal attention; a mask would only be in the way of faster kernels.
        left = bool((present[:, 1:] & ~present[:, :-1]).any())
        position_ids = (present.cumsum(-1) - 1).clamp_min(0)
        return self._run(
            transformers.DynamicCache(), layout.tokens, present if left else None, position_ids, present.sum(-1), {}
        )

    def extend(self, context: MainContext, tokens: Tensor) -> MainContext:
        """Run over further tokens.

        Args:
            context: what came before.
            tokens: (B, N), int64.

        Returns:
            The longer context.
        """
        count = tokens.shape[1]
        present = context.present
        if present is not None:
            present = torch.cat([present, present.new_ones(present.shape[0], count)], 1)
        position_ids = context.real[:, None] + torch.arange(count, device=tokens.device)
        return self._run(context.cache, tokens, present, position_ids, context.real + count, context.tables)

    def _run(
        self,
        cache: DynamicCache,
        tokens: Tensor,
        present: Tensor | None,
        position_ids: Tensor,
        real: Tensor,
        tables: dict[float, Any],
    ) -> MainContext:
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
                attention_mask=None if present is None else present.long(),
                position_ids=position_ids,
                use_cache=True,
                **{self._cache_name: cache},
            )
        return MainContext(cache, hidden[0], kwargs, present, real, cache.get_seq_length(), tables)

    def self_test(self, shadows: nn.ModuleList) -> None:
        """Replay the main path's hidden states through the shadows and require that they come out the same.

        Args:
            shadows: unmodulated shadow layers with the model's own weights.

        Raises:
            UnsupportedModelError: if a layer differs by more than rounding.
        """
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
