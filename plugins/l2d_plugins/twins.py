"""Modules for one call: they share the weights of a module that several threads may run, and keep its changes apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

_OWN_CALLS = {"forward", "_old_forward"}
"""What libraries put on single modules: kernels of the hub and Liger their forward, accelerate its hooks around it."""


def twin(module: nn.Module, **replaced: Any) -> Any:
    """A module that shares everything with another, which stays as it is, but some attributes."""
    made = object.__new__(type(module))
    # What was compiled would run the other.
    made.__dict__.update(module.__dict__, _compiled_call_impl=None, **replaced)
    for name in _OWN_CALLS & made.__dict__.keys():
        made.__dict__[name] = _rebound(made.__dict__[name], module, made)
    return made


def _rebound(call: Any, module: nn.Module, made: nn.Module) -> Any:
    if isinstance(call, MethodType) and call.__self__ is module:
        return MethodType(call.__func__, made)
    if isinstance(call, partial):
        return partial(call.func, *(made if given is module else given for given in call.args), **call.keywords)
    return call


def private(module: nn.Module, **children: Any) -> Any:
    """A twin whose children do not share what they change about themselves, as rotary embeddings of long texts do."""
    own = {
        name: twin(child, _buffers={key: None if b is None else b.clone() for key, b in child._buffers.items()})
        for name, child in module.named_children()
        if child._buffers
    }
    return twin(module, _modules={**module._modules, **own, **children})


def run_body(body: Any, **given: Any) -> Tensor:
    """Last hidden states, (B, T, H), of transformers' model without a head, run by a twin of its own."""
    # A config may ask for more outputs; transformers would collect them by hooks on modules that all twins share.
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(body.config, name, False):
            given[name] = False
    return private(body)(**given, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def cache_name(body: Any) -> str:
    """What a model's body calls its cache: since 5.24 transformers says `cache`."""
    return "cache" if "cache" in signature(body.forward).parameters else "past_key_values"


class Head(nn.Module):
    """The vocabulary head of a language model whose child `body` makes hidden states, soft caps and scales included."""

    def __init__(self, lm: nn.Module, body: str, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.lm = twin(lm, _modules={**lm._modules, body: _Through(norm)})

    def forward(self, features: Tensor) -> Tensor:
        """Logits, (B, n, V), of hidden states, (B, n, H), before the norm if one was given."""
        return self.lm(inputs_embeds=features, use_cache=False).logits  # type: ignore[no-any-return]


class _Through(nn.Module):
    """Stands for the body of a language model whose hidden states are already there."""

    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output(last_hidden_state=self.norm(inputs_embeds))


@dataclass
class _Output(MoeModelOutputWithPast):
    """Whatever heads ask the output of a body for."""

    cross_attentions: None = None


class StandIn:
    """A callable that is otherwise like the module in whose place it stands."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do `call` instead of what the module does."""
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the module has."""
        return getattr(self._module, name)
