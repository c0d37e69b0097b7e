"""A computation without its numbers: what it would hold in memory, found by running it on shapes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from l2d_framework.errors import L2DError

_INTEGERS, _FLOATS = 2**24, 2**20
"""Most entries of a tensor that keeps its values, so that a program can still ask for tokens, masks and times."""

_ATEN = torch.ops.aten
_FROM_PARAMETERS = {
    _ATEN._to_copy.default: "copies",
    _ATEN.zeros_like.default: "ahead",
    _ATEN.empty_like.default: "ahead",
}
"""As what the results of operations on parameters count."""


class NoValueError(L2DError, TypeError):
    """A computation on shapes asked for a number that only a real one has."""


class Shape(Tensor):
    """A tensor of which shape, type and share in memory are known, and no number.

    Its device is that of a real one, so that autocast and the choice of kernels are those of a real computation, unlike
    on the meta device, where it lies.
    """

    on_meta: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Self:
        """What a tensor on the meta device is on another one."""
        make: Any = Tensor._make_wrapper_subclass
        self = make(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        self.on_meta = inner
        return self  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Shape and type."""
        return f"Shape({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on shapes; of real tensors beside them no more is used."""
        return _on_shapes(func, args, kwargs or {})


def to_shapes(module: nn.Module, device: torch.device) -> None:
    """Turn the parameters and buffers of a module on the meta device into shapes on another one."""
    made: dict[Any, Any] = {}  # by the tensors themselves, so that tied ones stay one
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                if old not in made:
                    made[old] = nn.Parameter(Shape(old.detach(), device), old.requires_grad)
                part._parameters[name] = made[old]
        for name, held in part._buffers.items():
            if held is not None:
                part._buffers[name] = made.setdefault(held, Shape(held.detach().to("meta"), device))


class Held(NamedTuple):
    """Bytes that are held at one moment beside parameters and buffers."""

    gradients: int
    copies: int
    """Of parameters, in the type that autocast computes in."""
    ahead: int
    """Gradients that a loss has made before the backward pass, and other tensors made like a parameter."""
    others: int
    vocabulary: int
    """Of the others, what is as wide as the vocabulary."""


class Watch(TorchDispatchMode):
    """Runs what needs parameters or is large on shapes, and records what is held after every operation.

    A storage counts from the operation that made it until nothing refers to it any more, as an allocator would have it
    that rounds and keeps nothing. What a kernel takes and gives back within one operation is not seen.

    Args:
        parameters: those of the model, which are not counted.
        buffers: those of the model, which are not counted either.
        vocab_size: width of what counts as `vocabulary`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], buffers: Iterable[Tensor], vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.moments: list[Held] = []
        own = list(parameters)
        self._parameters = {id(_storage(p)) for p in own}
        self._uncounted = self._parameters | {id(_storage(held)) for held in buffers}
        self._vocab_size = vocab_size
        self._storages: dict[int, tuple[str, int, Any]] = {}
        self._now = dict.fromkeys((*Held._fields, "wide"), 0)
        self._hooks = [p.register_post_accumulate_grad_hook(self._is_gradient) for p in own if p.requires_grad]

    @property
    def now(self) -> Held:
        """What is held now."""
        now = self._now
        return Held(now["gradients"], now["copies"], now["ahead"], now["others"] + now["wide"], now["wide"])

    def close(self) -> None:
        """Stop listening for gradients."""
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and take down what it leaves."""
        kwargs = kwargs or {}
        if any(kind not in (Tensor, Shape, nn.Parameter) for kind in types):
            return NotImplemented  # of a tensor that knows itself what to do
        given = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in given:
            self._take(x, "others")
        found = _on_shapes(func, args, kwargs) if _has_no_values(func, args, kwargs, given) else func(*args, **kwargs)
        kind = _FROM_PARAMETERS.get(func, "others")
        if kind != "others" and id(_storage(args[0])) not in self._parameters:
            kind = "others"
        for x in _leaves(found):
            if isinstance(x, Tensor):
                self._take(x, kind)
        self.moments.append(self.now)
        return found

    def _take(self, x: Tensor, kind: str) -> None:
        storage = _storage(x)
        key = id(storage)
        if key in self._storages or key in self._uncounted:
            return
        if kind == "others" and x.ndim > 1 and x.shape[-1] == self._vocab_size and x.is_floating_point():
            kind = "wide"
        self._storages[key] = kind, storage.nbytes(), weakref.ref(storage, lambda _: self._drop(key))
        self._now[kind] += storage.nbytes()

    def _drop(self, key: int) -> None:
        kind, size, _ = self._storages.pop(key)
        self._now[kind] -= size

    def _is_gradient(self, parameter: Tensor) -> None:
        key = id(_storage(parameter.grad))
        kind, size, alive = self._storages[key]
        self._storages[key] = "gradients", size, alive
        self._now[kind] -= size
        self._now["gradients"] += size


def _storage(x: Any) -> Any:
    return (x.on_meta if isinstance(x, Shape) else x).untyped_storage()


def _has_no_values(func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> bool:
    """Whether an operation needs what has no values, or makes what is too large to have some."""
    if any(isinstance(x, Shape) or _is_large(x) for x in given):
        return True
    try:
        found = _on_meta(func, args, kwargs)
    except (NotImplementedError, RuntimeError):
        return False  # how much comes out depends on values
    return any(_is_large(x) for x in _leaves(found) if isinstance(x, Tensor))


def _is_large(x: Tensor) -> bool:
    return x.numel() > (_FLOATS if x.is_floating_point() else _INTEGERS)


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    plain, named = _changed((args, kwargs), _inner)
    return func(*plain, **named)


def _leaves(values: Any) -> Iterator[Any]:
    """What an operation is given or makes, out of the tuples, lists and mappings it is in."""
    # As `torch.utils._pytree`, in a third of the time.
    if type(values) in (tuple, list):
        for value in values:
            yield from _leaves(value)
    elif type(values) is dict:
        yield from _leaves(list(values.values()))
    else:
        yield values


def _changed(values: Any, change: Callable[[Any], Any]) -> Any:
    """The same with each of those changed."""
    if type(values) in (tuple, list):
        return type(values)([_changed(value, change) for value in values])
    if type(values) is dict:
        return {name: _changed(value, change) for name, value in values.items()}
    return change(values)


def _inner(x: Any) -> Any:
    if isinstance(x, Shape):
        return x.on_meta
    if isinstance(x, Tensor):
        return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    if isinstance(x, torch.Generator):
        return None
    return torch.device("meta") if isinstance(x, torch.device) else x


def _on_shapes(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is _ATEN._local_scalar_dense.default:
        raise NoValueError(f"A number of a tensor of shape {tuple(args[0].shape)} was asked for, which only a run has.")
    leaves = [x for x in _leaves((args, kwargs)) if isinstance(x, (Tensor, torch.device))]
    devices = [x if isinstance(x, torch.device) else x.device for x in leaves]
    device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
    given = args
    if func in (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default):
        given = (args[0], _places(args[1]), *args[2:])
    try:
        found = _on_meta(func, given, kwargs)
    except NotImplementedError as error:
        raise NoValueError(f"The shape of what {func} makes depends on numbers that only a run has.") from error
    found = _changed(found, lambda x: Shape(x, device) if isinstance(x, Tensor) else x)
    return return_and_correct_aliasing(func, args, kwargs, found)


def _places(indices: Iterable[Any]) -> list[Any]:
    """Indices with places for masks, whose values say how many they choose."""
    places: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, Shape)
        places += index.nonzero(as_tuple=True) if is_mask else [index]
    return places
