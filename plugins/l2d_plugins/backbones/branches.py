"""Reads the residual branches of decoder layers off one forward pass, by tensor identity and without name tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from l2d_framework.errors import UnsupportedModelError


@dataclass(frozen=True)
class Branch:
    """A chain of modules between two residual additions.

    Attributes:
        norm: name of the first normalisation, which takes scale and shift.
        gate: name of the last module, whose output takes the gate.
        owns_norm: False when another branch has already modulated that normalisation.
    """

    norm: str
    gate: str
    owns_norm: bool


@dataclass
class _Calls:
    entries: list[tuple[str, nn.Module, Tensor, Tensor]] = field(default_factory=list)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with a weight vector, such as LayerNorm or RMSNorm."""
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def find_branches(layers: nn.ModuleList, forward: Callable[[], Any], advice: str) -> list[tuple[Branch, Branch]]:
    """(attention, MLP) branch of every layer, found as `forward` runs them; else UnsupportedModelError, with advice."""
    calls = [_Calls() for _ in layers]
    handles = []
    for record, layer in zip(calls, layers, strict=True):
        for name, child in layer.named_children():
            if not isinstance(child, nn.Dropout):
                handles.append(child.register_forward_hook(_recorder(record, name), with_kwargs=True))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    try:
        return [_branches_of(record) for record in calls]
    except _OtherwiseBuilt as error:
        raise UnsupportedModelError(
            f"Backbone 'two_stream' cannot modulate {type(layers[0]).__name__}: {error}. {advice}"
        ) from None


class _OtherwiseBuilt(Exception):
    """Says what a layer has instead of two branches."""


def _recorder(record: _Calls, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        record.entries.append((name, module, given, output[0] if isinstance(output, tuple) else output))

    return hook


def _branches_of(record: _Calls) -> tuple[Branch, Branch]:
    outputs = [out for _, _, _, out in record.entries]
    heads = [entry for entry in record.entries if not any(entry[2] is out for out in outputs)]
    chains: list[list[tuple[str, nn.Module]]] = []
    for head in heads:
        _follow(record, head, [], chains)
    attention: list[Branch] = []
    mlp: list[Branch] = []
    used: set[str] = set()
    for chain in chains:
        norms = [name for name, module in chain if is_norm(module)]
        if not norms:
            raise _OtherwiseBuilt(f"the branch {' -> '.join(name for name, _ in chain)} has no normalisation")
        branch = Branch(norm=norms[0], gate=chain[-1][0], owns_norm=norms[0] not in used)
        used.add(norms[0])
        attends = any(hasattr(part, "layer_idx") for _, module in chain for part in module.modules())
        (attention if attends else mlp).append(branch)
    if len(attention) != 1 or len(mlp) != 1:
        raise _OtherwiseBuilt(f"it has {len(attention)} attention and {len(mlp)} MLP branches instead of one of each")
    return attention[0], mlp[0]


def _follow(
    record: _Calls,
    entry: tuple[str, nn.Module, Tensor, Tensor],
    prefix: list[tuple[str, nn.Module]],
    chains: list[list[tuple[str, nn.Module]]],
) -> None:
    chain = [*prefix, (entry[0], entry[1])]
    consumers = [other for other in record.entries if other[2] is entry[3] and other is not entry]
    if not consumers:
        chains.append(chain)
    for consumer in consumers:
        _follow(record, consumer, chain, chains)
