"""States as wide as the vocabulary, kept as tokens and seeds and made dense a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree

from l2d_framework.diffusion.logits import cached_pieces


@dataclass(frozen=True, eq=False)
class _Tokens:
    """One at each token, (B, L), zero elsewhere."""

    ids: Tensor


@dataclass(frozen=True, eq=False)
class _Normals:
    """Standard normal numbers from a seed per position, (B, L), kept on the host."""

    ids: Tensor


class WideState(Tensor):
    """A state (B, L, D) that holds no D numbers per position.

    It is a weighted sum of a constant, one-hot vectors and seeded noise. Adding such states, scaling them per position
    and taking positions keeps them so; whatever else torch is asked to do with one makes it dense first, so that code
    which knows nothing of it is right, if larger. It cannot be changed in place.
    """

    level: Tensor  # value of every component, (B, L), float32
    parts: list[tuple[_Tokens | _Normals, Tensor]]  # weighted atoms; each weight is (B, L), float32

    @staticmethod
    def __new__(cls, level: Tensor, parts: list[tuple[_Tokens | _Normals, Tensor]], size: int) -> Self:
        """A tensor without storage."""
        make: Any = Tensor._make_wrapper_subclass
        self = make(cls, (*level.shape, size), dtype=torch.float32, device=level.device)
        self.level, self.parts = level, parts
        return self  # type: ignore[no-any-return]

    @classmethod
    def simplex(cls, tokens: Tensor, value: float, size: int) -> Self:
        """+value at each of the tokens (B, L), -value elsewhere: (B, L, size)."""
        weight = torch.full(tokens.shape, 2 * value, device=tokens.device)
        return cls(-0.5 * weight, [(_Tokens(tokens), weight)], size)

    @classmethod
    def normal(cls, seeds: Tensor, size: int, device: torch.device) -> Self:
        """Standard normal noise from seeds (B, L), int64, on the host; other kinds of device draw other numbers."""
        one = torch.ones(seeds.shape, device=device)
        return cls(torch.zeros_like(one), [(_Normals(seeds), one)], size)

    def dense(self) -> Tensor:
        """All its numbers, (B, L, D), float32."""
        return self._filled(lambda place, state: place.add_(state.level[..., None]))

    def atoms(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Seeds, their weights, tokens and theirs, each (B, L), of a state of at most one noise and one token."""
        found = {type(atom): (atom.ids, weight) for atom, weight in self.parts}
        nothing = torch.zeros_like(self.level, dtype=torch.int64), torch.zeros_like(self.level)
        single = *found.get(_Normals, nothing), *found.get(_Tokens, nothing)
        return single if len(found) == len(self.parts) else None

    def _softmax(self) -> Tensor:
        # No level: what all components share does not change their softmax.
        return self._filled(lambda place, _: torch.softmax(place, -1, out=place))

    def _filled(self, finish: Callable[[Tensor, WideState], Any]) -> Tensor:
        """All its numbers but the level, finished a few positions at a time, each (1, n, D)."""
        out = torch.empty(self.shape, device=self.device)
        state, places = _map(self, lambda values: values.reshape(1, -1)), out.view(1, -1, self.shape[-1])
        for part in cached_pieces(places):
            here = _map(state, lambda values, part=part: values[:, part])  # type: ignore[misc]
            finish(here._write(places[:, part]), here)
        return out

    def _write(self, out: Tensor) -> Tensor:
        """Fill `out` with everything but the level."""
        noises = [(atom.ids, weight) for atom, weight in self.parts if isinstance(atom, _Normals)]
        if noises:
            _fill(out, *noises[0])
        else:
            out.zero_()
        for noise in noises[1:]:
            out.add_(_fill(torch.empty_like(out), *noise))
        for atom, weight in self.parts:
            if isinstance(atom, _Tokens):
                out.scatter_add_(-1, atom.ids[..., None], weight[..., None])
        return out

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Shape and number of parts, since printing must not make it dense."""
        return f"WideState(shape={tuple(self.shape)}, parts={len(self.parts)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Keep linear operations symbolic, refuse what changes it in place, and make everything else dense."""
        kwargs = kwargs or {}
        if func._schema.is_mutable and isinstance(args[0], WideState):
            raise TypeError(f"A WideState cannot be changed in place by {func}. Make a new one, as in `x = x * 2`.")
        rule = _rules().get(func)
        symbolic = NotImplemented if rule is None else rule(*args, **kwargs)
        if symbolic is not NotImplemented:
            return symbolic
        args, kwargs = _pytree.tree_map_only(WideState, WideState.dense, (args, kwargs))
        return func(*args, **kwargs)


def _fill(out: Tensor, seeds: Tensor, weights: Tensor) -> Tensor:
    """Weighted noise; the weight is applied while it is drawn, which saves a pass."""
    generator = torch.Generator(out.device)
    for row, *numbers in zip(out, seeds.tolist(), weights.tolist(), strict=True):
        for place, seed, weight in zip(row, *numbers, strict=True):
            if weight == 0:
                place.zero_()  # nothing is left of it at the read-out
                continue
            place.normal_(0.0, abs(weight), generator=generator.manual_seed(seed))
            if weight < 0:
                place.neg_()
    return out


def _map(state: WideState, change: Callable[[Tensor], Tensor]) -> WideState:
    """The same sum at other positions."""
    parts = [(type(atom)(change(atom.ids)), change(weight)) for atom, weight in state.parts]
    return WideState(change(state.level), parts, state.shape[-1])


def _scale(state: WideState, factor: Any) -> Any:
    if isinstance(factor, Tensor):
        shape = (*state.shape[:2], 1)
        if isinstance(factor, WideState) or (factor.ndim and torch.broadcast_shapes(factor.shape, shape) != shape):
            return NotImplemented
        factor = factor.float().expand(shape).squeeze(-1) if factor.ndim else factor.float()
    return WideState(state.level * factor, [(atom, weight * factor) for atom, weight in state.parts], state.shape[-1])


def _multiply(a: Any, b: Any) -> Any:
    return _scale(a, b) if isinstance(a, WideState) else _scale(b, a)


def _divide(a: Any, b: Any) -> Any:
    return _scale(a, 1 / b) if isinstance(a, WideState) and not isinstance(b, WideState) else NotImplemented


def _add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    if not (isinstance(a, WideState) and isinstance(b, WideState)) or a.shape != b.shape:
        return NotImplemented
    weights = {(type(atom), id(atom.ids)): (atom, weight) for atom, weight in a.parts}
    for atom, weight in b.parts:
        # The same noise or token on both sides is one part, or every step of a solver would double their number.
        name = (type(atom), id(atom.ids))
        before = weights.get(name)
        weights[name] = (atom, alpha * weight if before is None else before[1] + alpha * weight)
    return WideState(a.level + alpha * b.level, list(weights.values()), a.shape[-1])


def _slice(state: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if dim not in (0, 1):
        return NotImplemented
    part = slice(start, end, step)
    return _map(state, lambda values: values[part] if dim == 0 else values[:, part])


def _index(state: Any, indices: Any) -> Any:
    if not isinstance(state, WideState) or len(indices) > 2 or any(index is None for index in indices):
        return NotImplemented
    taken = _map(state, lambda values: values[tuple(index.to(values.device) for index in indices)])
    return taken if taken.level.ndim == 2 else NotImplemented


def _cat(states: Any, dim: int = 0) -> Any:
    if dim not in (0, 1) or not all(isinstance(state, WideState) for state in states):
        return NotImplemented
    kinds = [[type(atom) for atom, _ in state.parts] for state in states]
    if any(kind != kinds[0] for kind in kinds):
        return NotImplemented
    parts = [
        (type(same[0][0])(torch.cat([atom.ids for atom, _ in same], dim)), torch.cat([w for _, w in same], dim))
        for same in zip(*(state.parts for state in states), strict=True)
    ]
    return WideState(torch.cat([state.level for state in states], dim), parts, states[0].shape[-1])


def _softmax(state: Any, dim: int, is_half: bool) -> Any:
    return state._softmax() if dim in (-1, 2) and not is_half else NotImplemented


def _same(state: Any, **_: Any) -> Any:
    return _map(state, lambda values: values)


def _cast(state: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    is_same = dtype in (None, torch.float32) and device in (None, state.device)
    return _same(state) if is_same else NotImplemented


@lru_cache(maxsize=1)
def _rules() -> dict[Any, Callable[..., Any]]:
    aten = torch.ops.aten
    return {
        aten.mul.Tensor: _multiply,
        aten.div.Tensor: _divide,
        aten.add.Tensor: _add,
        aten.sub.Tensor: lambda a, b, *, alpha=1: _add(a, b, alpha=-alpha),
        aten.neg.default: lambda state: _scale(state, -1.0),
        aten.slice.Tensor: _slice,
        aten.index.Tensor: _index,
        aten.cat.default: _cat,
        aten._softmax.default: _softmax,
        aten.detach.default: _same,
        aten.alias.default: _same,
        aten._to_copy.default: _cast,
    }
