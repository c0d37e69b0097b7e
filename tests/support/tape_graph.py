"""A CUDA graph on the CPU: it notes every operation once, and then does the same to the same tensors."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_HOST = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class HostWaits(RuntimeError):
    """Raised where capturing would fail on a GPU: the host looks at a number."""


class TapeGraph(TorchDispatchMode):
    """A `Graph` that captures by doing the work under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self.changed: list[Any] = []
        self.made: Any = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in _HOST:
            # What a GPU captures it does not do.
            for tensor, before in reversed(self.changed):
                tensor.copy_(before)
            raise HostWaits(f"the host waits for {function}")
        self.changed += [
            (given, given.clone())
            for argument, given in zip(function._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        made = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_flatten((args, kwargs))[0] if _is_tensor(tensor)}
        outputs = [tensor for tensor in tree_flatten(made)[0] if _is_tensor(tensor)]
        fresh = [tensor.untyped_storage()._cdata not in given for tensor in outputs]
        self.operations.append((function, args, kwargs or {}, outputs, fresh))
        return made

    def __call__(self, work):
        if self.made is None:
            with self:
                self.made = work()
            return self.made
        for function, args, kwargs, outputs, fresh in self.operations:
            again = [tensor for tensor in tree_flatten(function(*args, **kwargs))[0] if _is_tensor(tensor)]
            for old, new, is_fresh in zip(outputs, again, fresh, strict=True):
                if is_fresh:
                    old.copy_(new)
        return self.made


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
