"""Shadow layers: copies of a language model's decoder layers that share its frozen parameters.

A shadow is the model's own layer object, deep-copied while its Parameters stay shared, so no modelling code is repeated
and the model itself is never touched. Modulation and gates stand in a twin of the shadow that each call makes for
itself; keys and values come from the main path through a read-only cache.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from l2d_plugins.backbones.branches import Branch
from l2d_plugins.backbones.folding import Own
from l2d_plugins.twins import StandIn, twin

KEY_VALUE = ("k_proj", "v_proj")
"""Projections whose results the diffusion path never reads."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 1024


class NoProjection(nn.Module):
    """Stands in for a projection nobody reads: zeros of the right shape, without weights, work or memory."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """Zeros, (..., out_features), a view of a single one."""
        return x.new_zeros(()).expand(*x.shape[:-1], self.out_features)


class MainKeys:
    """A cache that returns the main path's keys and values whatever it is given."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values the diffusion path attends to, (B, heads, T, head size); whatever is given is ignored."""
        layer = self.cache.layers[layer_idx]
        return layer.keys, layer.values


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear projection, of torch or of a library that quantizes."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def is_quantized(module: nn.Module) -> bool:
    """Whether a projection keeps its weights in another form than a matrix of floats."""
    weight = getattr(module, "weight", None)
    return is_linear(module) and not (type(weight) is nn.Parameter and weight.dtype in _FLOATS)


@torch.no_grad()
def unpacked(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Ordinary projection that does what a quantized one does, found by asking it."""
    bare: Any = copy.copy(module)
    # The bias is added after rounding, so the weight is read without it.
    for store in ("_parameters", "_buffers"):
        bare.__dict__[store] = {name: None if name == "bias" else x for name, x in getattr(module, store).items()}
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    size: int = bare.in_features
    rows = torch.arange(size, device=device).split(_CHUNK)
    columns = torch.cat([bare(functional.one_hot(part, size).to(dtype)) for part in rows])
    bias = getattr(module, "bias", None)
    plain = nn.Linear(size, bare.out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(columns.T.contiguous())
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(dtype).clone()))
    return plain


def make_shadow(layer: nn.Module, trainable: Iterable[str], dtype: torch.dtype) -> nn.Module:
    """Copy of a decoder layer that shares its parameters, and whole modules where they are quantized.

    Those of the linear modules named in `trainable` are copied instead; `dtype` is the model's, for quantized ones.
    """
    memo: dict[int, Any] = {}
    own = set(trainable)
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in KEY_VALUE and is_linear(module):
            memo[id(module)] = NoProjection(int(module.out_features))
        elif is_quantized(module):
            # Whatever state its library keeps beside the weights is not ours to copy.
            memo[id(module)] = unpacked(module, dtype) if name in own else module
        if name not in own:
            memo.update({id(p): p for p in module.parameters(recurse=False)})
        memo.update({id(b): b for b in module.buffers(recurse=False)})
        if hasattr(module, "config"):
            memo[id(module.config)] = module.config
    shadow = copy.deepcopy(layer, memo)
    for name in own:
        module = shadow.get_submodule(name).requires_grad_(True)
        if type(module) is nn.Linear:
            parent, _, attribute = name.rpartition(".")
            setattr(shadow.get_submodule(parent), attribute, Own(module))
    return shadow.eval()


class Modulated(nn.Module):
    """A shadow layer with scale, shift and gate on its two branches.

    Per branch: z = (gamma + scale) * normalize(y) + shift, y + gate * f(z), where gamma is the layer's own norm weight,
    so a norm that multiplies by 1 + weight stays right. The gate acts after a post-norm, since a norm would undo it.
    Source: authors' code; reference for families other than Llama and Qwen2 does not exist.

    Args:
        shadow: the layer.
        branches: its attention and MLP branch.
    """

    def __init__(self, shadow: nn.Module, branches: tuple[Branch, Branch]) -> None:
        super().__init__()
        self.shadow = shadow
        self.branches = branches

    @property
    def chunks(self) -> int:
        """Modulation vectors this layer takes: scale and shift per own norm, and two gates."""
        return sum(3 if branch.owns_norm else 1 for branch in self.branches)

    @torch.no_grad()
    def open(self, modulation: Tensor) -> None:
        """Set the gates in a modulation, (chunks * H), to one."""
        parts, gate = modulation.chunk(self.chunks), -1
        for branch in self.branches:
            gate += 3 if branch.owns_norm else 1
            parts[gate].fill_(1)

    def forward(self, y: Tensor, modulation: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run the layer; `modulation`, (B or 1, L or 1, chunks * H), holds scale, shift and gate of each branch."""
        parts = iter(modulation.to(y.dtype).chunk(self.chunks, -1))
        children: dict[str, Any] = dict(self.shadow._modules)
        for branch in self.branches:
            if branch.owns_norm:
                children[branch.norm] = _scaled(children[branch.norm], next(parts), next(parts))
            # A copy, so that the gradient of the gate keeps it alone and not the other chunks with it.
            gate = next(parts).clone() if torch.is_grad_enabled() else next(parts)
            children[branch.gate] = _gated(children[branch.gate], gate)
        out = twin(self.shadow, _modules=children)(y, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def _scaled(norm: Any, scale: Tensor, shift: Tensor) -> StandIn:
    def call(y: Tensor) -> Tensor:
        out: Tensor
        if isinstance(norm, nn.LayerNorm):
            out = norm(y) + scale * functional.layer_norm(y, norm.normalized_shape, eps=norm.eps)
        elif isinstance(norm, nn.RMSNorm):
            out = norm(y) + scale * functional.rms_norm(y, norm.normalized_shape, eps=norm.eps)
        else:
            # An attribute hides the parameter of its name, and need not be one.
            out = twin(norm, weight=norm.weight + scale)(y)
        return out + shift

    return StandIn(norm, call)


def _gated(module: nn.Module, gate: Tensor) -> StandIn:
    def call(*args: Any, **kwargs: Any) -> Any:
        out = module(*args, **kwargs)
        return (gate * out[0], *out[1:]) if isinstance(out, tuple) else gate * out

    return StandIn(module, call)


def gather_kwargs(kwargs: dict[str, Any], index: Tensor, length: int) -> dict[str, Any]:
    """What the model passed to a layer for a chunk of positions, for those at `index`, (B, L), in it; T is `length`.

    A missing (purely causal) mask is made explicit unless one query sees every key.
    """
    out = dict(kwargs)
    embeddings = kwargs.get("position_embeddings")
    if embeddings is not None:
        out["position_embeddings"] = tuple(_rows(part, index) for part in embeddings)
    if kwargs.get("position_ids") is not None:
        out["position_ids"] = _rows(kwargs["position_ids"][..., None], index)[..., 0]
    mask = kwargs.get("attention_mask")
    chunk = _chunk_length(kwargs)
    if mask is not None:
        expanded = mask.expand(index.shape[0], *mask.shape[1:])
        where = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        out["attention_mask"] = expanded.gather(2, where)
    elif chunk > 1 or index.shape[1] > 1:
        keys = torch.arange(length, device=index.device)
        out["attention_mask"] = keys <= (index + (length - chunk))[:, None, :, None]
    return out


def _chunk_length(kwargs: dict[str, Any]) -> int:
    embeddings = kwargs.get("position_embeddings")
    return int(embeddings[0].shape[1] if embeddings is not None else kwargs["position_ids"].shape[-1])


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Entries of (B or 1, n, d) at `index` (B, L)."""
    if values.shape[1] == 1:
        return values.expand(index.shape[0], index.shape[1], -1)
    expanded = values.expand(index.shape[0], -1, -1)
    return expanded.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
