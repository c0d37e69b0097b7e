"""Weights, gradients and optimizer states in shares, one for each process: torch's FSDP2 as accelerate sets it up.

accelerate shards classes of modules one by one. A model whose modules share weights says itself which of them belong
together, so its units are sharded here, with accelerate's options, and everything else is accelerate's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import AutocastKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from l2d_framework.config.sections import Updates
from l2d_framework.errors import ConfigError
from l2d_framework.training import zero

Units = Callable[[nn.Module], Sequence[Sequence[nn.Module]]]
"""Modules of a model whose weights are gathered together, as in `Backbone.units`."""

_UNSERVED = {
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
}


def is_asked_for() -> bool:
    """Whether the launcher asks for weights in shares."""
    return _is_true("ACCELERATE_USE_FSDP")


def check(training: Updates) -> None:
    """Refuse, before weights are loaded, what a launcher asks for that could not be trained as the run file says."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16" if training.bf16 else "no"):
        raise ConfigError(
            f"mixed_precision is {precision!r} in accelerate's configuration, but training.bf16 is "
            f"{str(training.bf16).lower()}. Set it to 'no' there: the run file says in what is computed."
        )
    if _is_true("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ConfigError(
            "accelerate's configuration has a parallelism_config, which is not supported. Remove it: batches are "
            "divided over all processes, and with FSDP2 so are weights."
        )
    if zero.is_asked_for():
        if is_asked_for():
            raise ConfigError("The launcher asks for FSDP and for DeepSpeed. Choose one in accelerate's configuration.")
        check_micro_batch(training)
        zero.check(training)
    if not is_asked_for():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"fsdp_version is {version}; only FSDP2 is served. Set it to 2 in accelerate's configuration."
        )
    for variable, name in _UNSERVED.items():
        if _is_true(variable):
            instead = " and training.gradient_checkpointing to true" if "checkpointing" in name else ""
            raise ConfigError(
                f"{name} is true in accelerate's configuration, which is not supported. Set it to false{instead}."
            )
    check_micro_batch(training)


def check_micro_batch(training: Updates) -> None:
    """Refuse a micro-batch whose size is still to be found out."""
    if training.micro_batch_size == "auto":
        raise ConfigError(
            "training.micro_batch_size is 'auto', but where anything is in shares a process that is out of memory "
            "would leave the others waiting for its share. Set a number."
        )


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def adopt(accelerator: Accelerator, units: Units) -> bool:
    """Have an accelerator whose launcher asks for shares prepare a model by its units; says whether it does."""
    if not is_asked_for():
        return False
    state: Any = accelerator.state
    if state.distributed_type is DistributedType.MULTI_CPU:
        # accelerate passes over the request on a CPU, where torch has all that it takes.
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        for shared in (AcceleratorState, PartialState):
            shared._shared_state["distributed_type"] = DistributedType.FSDP
    if not accelerator.is_fsdp2:  # one process alone
        return False

    # Else autocast keeps its copies of all weights, none of them in shares, until a forward pass has ended.
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    plainly = accelerator.prepare

    def prepare(*parts: Any, **options: Any) -> Any:
        if not isinstance(parts[0], nn.Module):
            return plainly(*parts, **options)
        model, optimizer = parts
        _check_types(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = []  # what is shared out must be held by nobody else
        _shard(model, units(model), bool(state.fsdp_plugin.reshard_after_forward))
        shares = dict(model.named_parameters())
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [shares[name] for name in own]
        # Of the model only the forward pass is left to prepare: autocast stands around it.
        prepared = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return prepared, accelerator.prepare_optimizer(optimizer)

    accelerator.prepare = prepare
    return True


def _check_types(model: nn.Module) -> None:
    odd = next((name for name, parameter in model.named_parameters() if not parameter.is_floating_point()), None)
    if odd is not None:
        raise ConfigError(
            f"{odd!r} is quantized, and quantized weights cannot be in shares. Launch with plain data parallelism "
            "(ddp.yaml), or start from a base model that is not quantized."
        )


def _shard(model: nn.Module, units: Sequence[Sequence[nn.Module]], reshard_after_forward: bool) -> None:
    for unit in units:
        fully_shard(list(unit), reshard_after_forward=reshard_after_forward)
        if len(unit) > 1:
            # FSDP gathers a group once and keeps it until all have run, but others run in between.
            for module in unit:
                module.register_forward_pre_hook(_gather)
                module.register_forward_hook(_give_up)
    fully_shard(model)


def _gather(module: Any, _: Any) -> None:
    module.unshard()


def _give_up(module: Any, _: Any, __: Any) -> None:
    if not torch.is_grad_enabled():  # nothing will ask for the weights in a backward pass
        module.reshard()


def is_sharded(model: nn.Module | None) -> bool:
    """Whether a model's weights are in shares."""
    return isinstance(model, FSDPModule)


def own_share(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all processes, each of which must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Give weights the values of another type; weights in shares keep their own type, the others get it."""
    if not is_sharded(model):
        model.to(dtype)
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for parameter in model.parameters():
        share = own_share(parameter)
        share.copy_(share.to(dtype))


@contextmanager
def whole(model: nn.Module, *, reads: bool) -> Iterator[None]:
    """Let one process, the one that `reads`, see everything that is trained as if it had never been shared out.

    Every process must enter. The whole weights lie in the memory of the host, and are no part of the model afterwards.
    """
    modules = list(model.modules())
    sharded: list[Any] = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.reshard()  # the outermost keeps its weights after an evaluation
    gathered: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in modules if sharded else []:
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in gathered:
                tensor = whole_tensor(parameter.detach())
                gathered[id(parameter)] = nn.Parameter(tensor.cpu() if reads else tensor.new_empty(0))
            replaced.append((module, name, parameter))
    try:
        if reads:
            for module, name, parameter in replaced:
                module._parameters[name] = gathered[id(parameter)]
        yield
    finally:
        if reads:
            for module, name, parameter in replaced:
                module._parameters[name] = parameter


def whole_state(optimizer: Optimizer, *, reads: bool) -> dict[str, Any]:
    """An optimizer's state as one process alone would have it, for the one that `reads`; every process must ask."""
    if isinstance(optimizer, zero.ZeroOptimizer):
        return optimizer.whole_state(reads=reads)
    state = optimizer.state_dict()

    def whole(value: Any) -> Any:
        found = whole_tensor(value) if isinstance(value, Tensor) else value
        return None if not reads else found.cpu() if isinstance(found, Tensor) else found

    return state | {
        "state": {
            number: {name: whole(value) for name, value in known.items()}
            for number, known in sorted(state["state"].items())
        }
    }


def load_state(optimizer: Optimizer, path: Path) -> None:
    """Take this process's share of a state that `whole_state` or one process alone has given, from its file."""
    # Mapped, so that processes of one machine have it in memory once.
    state = torch.load(path, map_location="cpu", mmap=True)
    if isinstance(optimizer, zero.ZeroOptimizer):
        optimizer.load_state_dict(state)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {
        number: {name: _share_like(value, parameters[number]) for name, value in known.items()}
        for number, known in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": shares})


def _share_like(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        on_device = value.to(parameter.device)
        value = distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.clone()  # no part of the file, which may go
