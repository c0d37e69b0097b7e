"""Optimizer states and gradients in shares as DeepSpeed makes them: ZeRO stages 1 and 2, where the launcher asks.

Of DeepSpeed only the engine is used. For accelerate and transformers the run is one of plain data parallelism, so the
run file alone says how large batches are, where gradients are clipped and in what is computed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from typing_extensions import override

from l2d_framework.config.sections import Updates
from l2d_framework.errors import ConfigError

TRIED = SpecifierSet(">=0.19.8,<0.20")
"""Releases of DeepSpeed. Older ones may take steps whose gradients are no numbers, also in float32; three names that
`ZeroOptimizer` uses are no public ones."""

_ASKED = "ACCELERATE_USE_DEEPSPEED"
_UNSERVED = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("deepspeed_config_file", "Name zero_stage under deepspeed_config instead"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("offload_optimizer_device", "Set it to none"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("offload_param_device", "Set it to none"),
}


def is_asked_for() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get(_ASKED, "false").lower() in ("true", "1")


def check(training: Updates) -> None:
    """Refuse what a launcher asks of DeepSpeed that could not be trained as the run file says."""
    stage = _stage()
    if stage == "3":
        raise ConfigError(
            "zero_stage is 3 in accelerate's configuration, which is not supported: DeepSpeed gathers a weight for one "
            "module, but a diffusion path runs several modules with the same weights. Launch with FSDP2 (fsdp2.yaml), "
            "which shares out the same, or set it to 1 or 2."
        )
    if stage not in ("1", "2"):
        raise ConfigError(f"zero_stage is {stage} in accelerate's configuration. Set it to 1 or 2.")
    for variable, (name, advice) in _UNSERVED.items():
        if (value := os.environ.get(variable, "none")).lower() != "none":
            raise ConfigError(f"{name} is {value!r} in accelerate's configuration, which is not supported. {advice}.")
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto") and float(clipping) != training.max_grad_norm:
        raise ConfigError(
            f"gradient_clipping is {clipping} in accelerate's configuration, but training.max_grad_norm is "
            f"{training.max_grad_norm}. Leave it out there: the run file says where gradients are clipped."
        )
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = ""
    if not found or found not in TRIED:
        raise ConfigError(
            f"The launcher asks for DeepSpeed, of which {found or 'nothing'} is installed. Install "
            f"'deepspeed{TRIED}', or launch with FSDP2 (fsdp2_keep.yaml)."
        )


def _stage() -> str:
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")


@contextmanager
def unseen() -> Iterator[None]:
    """Have accelerate and transformers set up plain data parallelism, although the launcher asks for DeepSpeed."""
    asked = os.environ.get(_ASKED)
    if asked is not None:
        os.environ[_ASKED] = "false"
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_ASKED] = asked


def adopt(accelerator: Accelerator, max_grad_norm: float) -> bool:
    """Have DeepSpeed's engine train a model, if the launcher asks for it; says whether it does."""
    if not (is_asked_for() and torch.distributed.is_initialized()):
        return False
    import deepspeed

    plainly = accelerator.prepare
    config = {
        "train_micro_batch_size_per_gpu": 1,  # it has to be a number, and nothing follows from it
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": int(_stage())},
        "zero_allow_untested_optimizer": True,
    }

    def prepare(*parts: Any, **options: Any) -> Any:
        if not isinstance(parts[0], nn.Module):
            return plainly(*parts, **options)
        model, optimizer = parts
        groups = [list(group["params"]) for group in optimizer.param_groups]
        # Of the model only the forward pass is left to prepare: autocast stands around it.
        model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        engine, shared, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.set_gradient_accumulation_boundary(True)

        def backward(loss: Tensor, **_: Any) -> None:
            # DeepSpeed leaves out an update by its gradients alone, so in them a loss that is no number must show.
            sound = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            engine.backward(loss * sound)

        @contextmanager
        def no_sync(*_: Any, **__: Any) -> Iterator[None]:
            engine.set_gradient_accumulation_boundary(False)
            try:
                yield
            finally:
                engine.set_gradient_accumulation_boundary(True)

        def step(*_: Any) -> Any:
            # Clips, and takes the step if the norm is a number; there is no norm before.
            engine.step()
            return engine.get_global_grad_norm()

        accelerator.backward, accelerator.no_sync, accelerator.clip_grad_norm_ = backward, no_sync, step
        return engine, ZeroOptimizer(shared, groups)

    accelerator.prepare = prepare
    return True


class ZeroOptimizer(AcceleratedOptimizer):  # type: ignore[misc]  # accelerate has no annotations
    """DeepSpeed's optimizer with the state that one process alone would have; the engine takes its steps."""

    def __init__(self, shared: Any, groups: list[list[nn.Parameter]]) -> None:
        super().__init__(shared, device_placement=False)
        self._groups = groups

    @override
    def step(self, closure: Any = None) -> None:
        pass

    @override
    def state_dict(self) -> dict[str, Any]:
        """Every process must ask."""
        return self.whole_state(reads=True)

    def whole_state(self, *, reads: bool) -> dict[str, Any]:
        """The state that one process alone would have, for the one that `reads`; every process must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._find_states()
        inner = self.optimizer.optimizer
        known: dict[str, Any] = next(iter(inner.state.values()), {})
        numbers = iter(range(sum(map(len, self._groups))))
        groups = [
            group | {"params": [next(numbers) for _ in parameters]}
            for group, parameters in zip(inner.param_groups, self._groups, strict=True)
        ]

        def whole(parameter: nn.Parameter, name: str) -> Tensor | None:
            found: Tensor = known[name] if name == "step" else safe_get_full_optimizer_state(parameter, name)
            return found.to("cpu", copy=True) if reads else None  # each parameter counts its own steps

        parameters = [parameter for group in self._groups for parameter in group]
        state = {
            number: {name: whole(parameter, name) for name in known} for number, parameter in enumerate(parameters)
        }
        return {"state": state, "param_groups": groups}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's share."""
        from deepspeed.utils import safe_set_full_optimizer_state

        inner = self.optimizer.optimizer
        for group, saved in zip(inner.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        parameters = [parameter for group in self._groups for parameter in group]
        for known in list(state_dict["state"].values())[:1]:
            for flat in self.optimizer.single_partition_of_fp32_groups:
                inner.state[flat] = {
                    name: value.to(flat.device, copy=True) if name == "step" else torch.zeros_like(flat)
                    for name, value in known.items()
                }
        self._find_states()
        for number, known in state_dict["state"].items():
            for name in known.keys() - {"step"}:
                safe_set_full_optimizer_state(parameters[number], known[name], name)

    def _find_states(self) -> None:
        if self.optimizer.optimizer.state:
            # By itself DeepSpeed looks once, after the first step, when only the first group has any.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
