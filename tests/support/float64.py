"""Code written for float32, run in float64: what rounding hides or makes up is then 1e9 times smaller."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """Inside this context every request for float32 is one for float64.

    Networks round states, norms and logits to float32 whatever the type of their weights is, this package as well as
    transformers; weights and inputs are the caller's to convert.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with float64 wherever it was told float32."""
        if func is Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = [wide.get(value, value) if isinstance(value, torch.dtype) else value for value in args]
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)
