"""The two-stream backbone of L2D: a diffusion path that reads the keys and values of a frozen language model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from l2d_framework.backbone import Backbone, BackboneConfig
from l2d_framework.errors import ConfigError, UnsupportedModelError
from l2d_framework.types import Layout
from l2d_plugins.backbones.conditioning import Conditioning
from l2d_plugins.backbones.folding import fold
from l2d_plugins.backbones.main_path import MainContext, MainPath
from l2d_plugins.backbones.shadow import (
    KEY_VALUE,
    Modulated,
    gather_kwargs,
    is_linear,
    make_shadow,
)

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig  # takes seconds to import, and listing plugins needs none of it
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

    from l2d_plugins.backbones.compiling import Compiled

ADAPTER = "diffusion"
_EPSILON = 1e-6


class TwoStreamConfig(BackboneConfig):
    """A diffusion path over any Hugging Face causal language model (arXiv:2501.15781, section 3.2 and appendix).

    Follows the released code where the paper is silent: the paths merge before the final norm, modulation is gamma +
    scale, LoRA sits on the query, output and MLP projections with A drawn from N(0, 1 / rank^2), the current position's
    key is visible, and the label of unconditional generation is the last row of the class table.
    """

    name: Literal["two_stream"] = "two_stream"
    variant: Literal["lora", "full", "full_random"] = "lora"
    """`full` trains copies of the projections, `full_random` the same without the language model's initial values."""
    rank: int = Field(default=32, gt=0)
    """Rank of the LoRA of `variant: lora`; parameters grow with it. Raise it for skills far from the base model's."""
    alpha: float = Field(default=32.0, gt=0)
    """Its updates count alpha / rank times; change it along with `rank` to keep their size."""
    targets: tuple[str, ...] | None = Field(default=None, strict=False)
    """Last names of the adapted linear modules; all but keys and values when None."""
    time_features: int = Field(default=256, gt=1, multiple_of=2)
    """Fourier features of the time; even."""
    conditioning_size: int = Field(default=256, gt=0)
    """Width of the network that turns time and class into modulations; lower it to save parameters."""
    gates: Literal["closed", "open"] = "closed"
    """Whether the gates of a fresh path's branches are `closed`, at zero as in the paper, or `open`, at one. Closed,
    they and the weight of the path in the sum, zero as well, wait for one another, so that the first updates teach
    little; open, the path computes on its input what the language model would, and that weight alone starts at zero. A
    fresh path changes nothing either way.

    Source: one layer of zeros between a trained network and its copy, arXiv:2302.05543."""
    carry: bool = False
    """Let every evaluation read the hidden states of the one before, normalised and through a linear map that starts at
    zero, so that evaluations compute on where the last one ended. Only `training.unroll` teaches it."""

    @override
    def check(self, lm_config: Any, block_size: int | None) -> None:
        if block_size != 1:
            raise ConfigError(
                f"Backbone 'two_stream' denoises one token per block; got block_size={block_size}. Set block_size to 1."
            )
        if getattr(lm_config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"Backbone 'two_stream' needs a decoder-only model; {lm_config.model_type!r} is an encoder-decoder. "
                "Choose a causal language model."
            )

    @override
    def build(self, lm: PreTrainedModel) -> TwoStream:
        return TwoStream(self, lm)


class TwoStream(Backbone[MainContext]):
    """Module of `TwoStreamConfig`.

    Args:
        config: its configuration.
        lm: the language model; its weights are frozen and never changed.
    """

    identity_at_zero: ClassVar[bool] = True
    independent_positions: ClassVar[bool] = True
    rewinds: ClassVar[bool] = True
    joins: ClassVar[bool] = True
    compiles: ClassVar[bool] = True

    config: TwoStreamConfig

    def __init__(self, config: TwoStreamConfig, lm: PreTrainedModel) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self._compiled: Compiled | None = None
        lm.requires_grad_(False)
        self.lm = lm.eval()
        self.main = MainPath(lm)
        self.vocab_size, self.hidden_size = self.table().shape
        branches = self.main.find_branches()
        layers = self.main.layers
        names = [_target_names(layer, config.targets) for layer in layers]
        own = names if config.variant != "lora" else [[] for _ in names]
        shadows = nn.ModuleList(make_shadow(layer, own[i], lm.dtype) for i, layer in enumerate(layers))
        if self.table().device.type != "meta":
            self.main.self_test(shadows)
        if config.variant == "full_random":
            for i, shadow in enumerate(shadows):
                for name in own[i]:
                    lm._init_weights(shadow.get_submodule(name))
        if config.variant == "lora":
            lora = self._lora_config([f"{i}.{name}" for i, row in enumerate(names) for name in row])
            from l2d_plugins.backbones.low_rank import adapt

            adapt(shadows, lora, ADAPTER)
        modulated = [Modulated(s, b) for s, b in zip(shadows, branches, strict=True)]
        self.shadows = nn.ModuleList(modulated)
        self.conditioning = Conditioning(
            (config.time_features, config.conditioning_size),
            self.hidden_size,
            [layer.chunks for layer in modulated],
            config.num_classes,
        ).to(self.table().device)
        if config.gates == "open":
            for layer, bias in zip(modulated, self.conditioning.biases(), strict=True):
                layer.open(bias)
        self.carries = config.carry
        if config.carry:
            # Zeros, so that a fresh path is that without it.
            self.carried = nn.Parameter(torch.zeros(self.hidden_size, self.hidden_size, device=self.table().device))
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _lora_config(self, targets: list[str]) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # peft divides by the rank, so a float is fine
            target_modules=targets,
            # Drawn on the meta device, numbers that are none take longest of all.
            init_lora_weights=self.table().device.type != "meta" and "gaussian",
        )

    @override
    def train(self, mode: bool = True) -> Self:
        # Dropout in the frozen path would break the identity at t = 0, and transformers' own gradient checkpointing,
        # which only acts in training mode, would silently drop the cache.
        super().train(mode)
        self.lm.eval()
        self.shadows.eval()
        return self

    @override
    def table(self) -> Tensor:
        return self.lm.get_input_embeddings().get_parameter("weight")

    @override
    def read(self, layout: Layout) -> MainContext:
        return self.main.read(layout)

    @override
    def extend(self, context: MainContext, tokens: Tensor) -> MainContext:
        return self.main.extend(context, tokens)

    @override
    def rewind(self, context: MainContext, counts: Tensor) -> MainContext:
        return self.main.rewind(context, counts)

    @override
    def join(self, contexts: Sequence[MainContext], slots: int) -> MainContext:
        return self.main.join(contexts, slots)

    @override
    def fixed(self, context: MainContext, slots: int, most: int) -> MainContext | None:
        return self.main.fixed(context, slots, most)

    @override
    def plain(self, positions: Tensor, context: MainContext) -> Tensor:
        return context.hidden_at(positions)

    @override
    def carry(self, hidden: Tensor) -> Tensor:
        # As the head reads them, the final norm's weight aside, which the map has in it.
        state = functional.rms_norm(hidden.to(self.carried.dtype), (self.hidden_size,), eps=_EPSILON)
        return functional.linear(state, self.carried)

    @override
    def features(
        self,
        h: Tensor,
        t: Tensor,
        positions: Tensor,
        context: MainContext,
        condition: Tensor | None,
        *,
        shared_time: float | None = None,
        compiled: bool = False,
    ) -> Tensor:
        # The diffusion token about position i sits at input position i - 1: it has that position's rotary angle and
        # causal row and reads the main path's keys and values up to it. Where t is 0 the sum, made before the final
        # norm, is exactly the main hidden state.
        main = context.hidden_at(positions)
        if shared_time is None or torch.is_grad_enabled():
            modulations, weight = self.conditioning(t, condition)
        else:
            if shared_time not in context.tables:
                context.tables[shared_time] = self.conditioning.table(shared_time)
            modulations, weight = self.conditioning.look_up(context.tables[shared_time], condition)
        index = context.index(positions)
        y = h.to(main.dtype)
        # Weights trained in single precision over a model in half; everything else has one type already.
        is_mixed = weight.dtype == torch.float32 != y.dtype
        mixed = torch.autocast(y.device.type, dtype=y.dtype) if is_mixed else nullcontext()

        call = self._compiler() if compiled and not torch.is_grad_enabled() else None

        def run(number: int, y: Tensor, modulation: Any, kwargs: dict[str, Any]) -> Tensor:
            modulation = modulation() if callable(modulation) else modulation
            layer = self.shadows[number]
            with mixed:
                if call is not None:
                    return call(layer, y, modulation, kwargs, number)
                return layer(y, modulation, kwargs)  # type: ignore[no-any-return]

        gathered: dict[tuple[int, int], dict[str, Any]] = {}
        for number, (modulation, captured) in enumerate(zip(modulations, context.kwargs, strict=True)):
            kind = (id(captured.get("attention_mask")), id(captured.get("position_embeddings")))
            if kind not in gathered:
                gathered[kind] = gather_kwargs(captured, index, context.length)
            kwargs = gathered[kind]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                y = checkpoint(run, number, y, modulation, kwargs, use_reentrant=False)
            else:
                y = run(number, y, modulation, kwargs)
        change: Tensor = (weight * y.to(weight.dtype)).to(main.dtype)
        return main + change.masked_fill((t == 0)[..., None], 0)

    @property
    @override
    def head(self) -> nn.Module:
        return self.main.head

    @override
    def units(self) -> Sequence[Sequence[nn.Module]]:
        # A layer and its shadow share frozen weights.
        pairs = zip(self.main.layers, self.shadows, strict=True)
        return [*pairs, *((network,) for network in self.conditioning.layers)]

    @override
    def peft_adapter(self) -> tuple[PeftConfig, dict[str, Tensor]] | None:
        modules = self._lora_modules()
        if not modules:
            return None
        state = {
            f"base_model.model.{name}.lora_{half}.weight": getattr(module, f"lora_{half}")[ADAPTER].weight
            for name, module in modules.items()
            for half in ("A", "B")
        }
        return self._lora_config(list(modules)), state

    def _lora_modules(self) -> dict[str, LoraLayer]:
        """Adapted modules by the name of their original in the language model."""
        from peft.tuners.lora import LoraLayer

        return {
            f"{self.main.layers_name}.{number}.{name}": module
            for number, layer in enumerate(self.shadows)
            for name, module in layer.get_submodule("shadow").named_modules()
            if isinstance(module, LoraLayer)
        }

    @override
    def merge(self, how: Literal["auto", "always", "never"] = "auto") -> None:
        fold(self.shadows, self.lm.dtype, how)

    def _compiler(self) -> Compiled:
        if self._compiled is None:
            from l2d_plugins.backbones.compiling import Compiled

            self._compiled = Compiled()
        return self._compiled


def _target_names(layer: nn.Module, targets: tuple[str, ...] | None) -> list[str]:
    # Linear modules of a layer that the diffusion path adapts.
    linear = [
        name for name, module in layer.named_modules() if is_linear(module) and name.rpartition(".")[2] not in KEY_VALUE
    ]
    chosen = linear if targets is None else [name for name in linear if name.rpartition(".")[2] in targets]
    known = {name.rpartition(".")[2] for name in linear}
    unknown = sorted(set(targets or ()) - known)
    if unknown or not chosen:
        raise ConfigError(
            f"backbone.targets names {unknown or list(targets or ())}, which {type(layer).__name__} has not. "
            f"Choose from {sorted(known)}."
        )
    return chosen
