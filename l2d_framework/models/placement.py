"""Layers that lie in the host's memory or on the disk until they run, for models larger than the device that computes.

Weights are brought in and dropped again around the calls of a backbone's units, and are read nowhere else.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l2d_framework.backbone import Backbone
from l2d_framework.errors import ConfigError, shown, suggest
from l2d_framework.writing import in_bytes

if TYPE_CHECKING:
    from l2d_framework.models.diffusion_lm import DiffusionLM

DeviceMap = str | Mapping[str, int | str | torch.device]
HOST, DISK = "cpu", "disk"
_SHARE = 0.9
"""Of the free memory of the device that computes, for weights; the rest is for what is computed."""


@dataclass(frozen=True)
class Placement:
    """Where a user wants the layers of a model to lie, in transformers' terms."""

    device_map: DeviceMap
    """`auto`, or a device for names of the language model's modules: one that computes, `cpu` or `disk`."""
    max_memory: Mapping[int | str, int | str] | None = None
    """Most memory of a device for `auto`, in bytes or as `10GiB`; what is free when None."""
    offload_folder: str | Path | None = None
    """Where layers on the disk are kept while the model lives."""

    def __post_init__(self) -> None:
        if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ConfigError(
                f"device_map is for one process, and {count} were launched: each would have the whole model. Launch "
                "one, or leave device_map out."
            )
        if isinstance(self.device_map, str) and self.device_map != "auto":
            raise ConfigError(
                f"device_map should be 'auto' or name devices by module, such as {{'model.layers.0': 'disk'}}; got "
                f"{self.device_map!r}. For a single device leave it out and give device."
            )
        if self.max_memory is not None and self.device_map != "auto":
            raise ConfigError("max_memory is for device_map='auto'; a map says itself what lies where. Leave one out.")
        for name in (self.max_memory or {}) if self.device_map == "auto" else ():
            if _device(name) == DISK:
                raise ConfigError("max_memory limits devices and 'cpu'; the disk has what is left. Leave 'disk' out.")

    @classmethod
    def of(cls, device_map: Any, max_memory: Any = None, offload_folder: Any = None) -> Placement | None:
        """What options ask for; None without a map, which may be JSON, as from a command line."""
        if device_map is None:
            for name, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
                if value is not None:
                    raise ConfigError(f"{name} is for models with a device_map. Give one, or leave {name} out.")
            return None
        device_map, max_memory = _parsed("device_map", device_map), _parsed("max_memory", max_memory)
        if max_memory is not None:
            if not isinstance(max_memory, Mapping):
                raise ConfigError(f"max_memory should name devices, such as {{0: '10GiB'}}; got {shown(max_memory)}.")
            # JSON has no other names than strings.
            max_memory = {int(n) if isinstance(n, str) and n.isdecimal() else n: x for n, x in max_memory.items()}
        return cls(device_map, max_memory, offload_folder)

    def plan(self, empty: DiffusionLM, device: str | torch.device | None, *, beside: int = 0) -> Plan:
        """Where everything will lie, from a model's shapes; refuses what cannot be before weights are loaded.

        Args:
            empty: on the meta device, in the types that its weights will have.
            device: the one that computes; when None that of the map, or the accelerator if there is one.
            beside: bytes of other models that will lie on that device, for which `auto` leaves room.

        Returns:
            The plan.

        Raises:
            ConfigError: if it cannot be done so.
        """
        lm = empty.backbone.lm
        names = {id(module): name for name, module in lm.named_modules()}
        movable = _layers(empty.backbone)
        where = [next(names[id(module)] for module in unit if id(module) in names) for unit in movable]
        if isinstance(self.device_map, str):
            main, places = self._fitted(empty, movable, device, beside)
        else:
            main, places = self._mapped(self.device_map, dict.fromkeys(names.values()), where, device)
        if DISK in places and self.offload_folder is None:
            raise ConfigError(
                f"{places.count(DISK)} layers are to lie on the disk, but offload_folder is not set. Name a folder."
            )
        if set(places) - {str(main)} and getattr(lm.config, "quantization_config", None) is not None:
            raise ConfigError(
                "Quantized layers cannot lie elsewhere than on the device that computes. Take the base model from "
                "before quantization, or a device that holds the quantized one."
            )
        return Plan(main, [place if place != str(main) else None for place in places], self.offload_folder)

    def _mapped(
        self, asked: Mapping[str, Any], names: Mapping[str, Any], units: Sequence[str], device: Any
    ) -> tuple[torch.device, list[str]]:
        chosen = {name: _device(place) for name, place in asked.items()}
        for name in chosen:
            if name not in names:
                raise ConfigError(
                    f"device_map names {name!r}, and the language model has no such module{suggest(name, names)}. Its "
                    f"layers are {units[0]!r} to {units[-1]!r}."
                )
        given = [] if device is None else [_device(device)]
        computing = sorted({*given, *chosen.values()} - {HOST, DISK})
        if len(computing) > 1:
            raise ConfigError(
                f"device_map names {computing}, but one device computes, and layers that do not fit wait on 'cpu' or "
                "'disk'. Name one of them."
            )
        main = computing[0] if computing else HOST if given else str(_computing())

        def place(name: str) -> str:
            parents = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)]
            return next((chosen[one] for one in [*parents, ""] if one in chosen), main)

        for name in chosen:
            holds_units = any(unit == name or unit.startswith(f"{name}.") or not name for unit in units)
            if chosen[name] != main and not holds_units:
                raise ConfigError(
                    f"device_map puts {name!r} on {chosen[name]!r}, but only whole layers can wait elsewhere than on "
                    f"{main!r}: {units[0]!r} to {units[-1]!r}."
                )
        return torch.device(main), [place(unit) for unit in units]

    def _fitted(
        self, empty: DiffusionLM, units: Sequence[Sequence[nn.Module]], device: Any, beside: int
    ) -> tuple[torch.device, list[str]]:
        from accelerate.utils import get_max_memory

        main = torch.device(_device(device or _computing()))
        asked = None if self.max_memory is None else dict(self.max_memory)
        try:
            limits: dict[Any, int] = get_max_memory(asked)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"max_memory is {shown(asked)}, which cannot be read: {error}") from error
        limit = limits.get(main.type if main.type in (HOST, "mps") else main.index, 0)
        if asked is None:
            limit = int(_SHARE * limit)
        sizes = [_bytes(unit) for unit in units]
        # Beside what stays there the largest layer that comes in.
        rest = beside + _bytes([empty]) - sum(sizes)
        if rest + sum(sizes) <= limit:
            return main, [str(main)] * len(units)
        free = limit - rest - max(sizes)
        if free < 0:
            what = "Embeddings, head and one layer" + (" and other models" if beside else "")
            raise ConfigError(
                f"{what} take {in_bytes(rest + max(sizes))}, but {str(main)!r} may give {in_bytes(limit)}. Raise "
                "max_memory, take fewer bytes a weight (dtype), or another device."
            )
        room = {str(main): free, HOST: limits.get(HOST, 0)} if str(main) != HOST else {HOST: free}
        places = []
        for size in sizes:
            # In order, so that a layer never lies faster than one before it.
            while room and next(iter(room.values())) < size:
                del room[next(iter(room))]
            places.append(next(iter(room), DISK))
            if room:
                room[places[-1]] -= size
        return main, places


@dataclass(frozen=True)
class Plan:
    """Where everything of a model lies."""

    main: torch.device
    """The device that computes."""
    places: Sequence[str | None]
    """Of each unit with a layer of the language model; None for the device that computes."""
    folder: str | Path | None = None

    @classmethod
    def onto(cls, device: str | torch.device | None) -> Plan:
        """Everything on one device, the CPU when None."""
        return cls(torch.device(device or HOST), ())

    def apply(self, model: DiffusionLM) -> DiffusionLM:
        """Put a model that was loaded into the host's memory where the plan says."""
        if not any(self.places):
            return model.to(self.main)
        model.backbone.is_offloaded = True
        units = _layers(model.backbone)
        folder = _folder(model, self.folder) if DISK in self.places else None
        for number, (unit, place) in enumerate(zip(units, self.places, strict=True)):
            if place is not None:
                _Away(unit, self.main, None if place == HOST or folder is None else folder / str(number))
        nn.Module._apply(model, lambda x: x if x.is_meta else x.to(self.main))
        return model


def _parsed(name: str, value: Any) -> Any:
    """What a text that is JSON says, as from a command line; anything else as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith("{")):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ConfigError(f"{name} is no JSON: {error}; got {shown(value)}.") from error


def _computing() -> torch.device:
    """The device that computes where nobody names one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(_device(found or HOST))


def _layers(backbone: Backbone) -> list[Sequence[nn.Module]]:
    """Units that have a layer of the language model."""
    known = {id(module) for module in backbone.lm.modules()}
    return [unit for unit in backbone.units() if any(id(module) in known for module in unit)]


def _folder(model: nn.Module, parent: str | Path | None) -> Path:
    """A new folder in another, which is made when missing; it goes when the model does."""
    assert parent is not None  # `Placement.plan` refuses that
    parent = Path(parent).expanduser()
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="l2d-", dir=parent))
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return folder


class _Away:
    """Weights of a unit's modules, which are there only while one of these runs.

    accelerate's own hooks would make other parameters at every call, so that modules that share them no longer do.
    """

    def __init__(self, unit: Sequence[nn.Module], device: torch.device, folder: Path | None) -> None:
        self._device = device
        slots = [list(_slots(module)) for module in unit]
        distinct = {id(weight): weight for one in slots for *_, weight in one}
        self._stored = [*distinct.values()] if folder is None else _on_disk([*distinct.values()], folder)
        self._absent = [_like(weight, weight.detach().to("meta")) for weight in distinct.values()]
        numbers = {one: number for number, one in enumerate(distinct)}
        self._running = RLock()
        for module, mine in zip(unit, slots, strict=True):
            places = [(owner, name, numbers[id(weight)]) for owner, name, weight in mine]
            self._put(self._absent, places)
            _run_in(partial(self._here, places), module)

    @contextmanager
    def _here(self, places: list[_Place]) -> Iterator[None]:
        with self._running:  # another thread would take them away
            try:
                here = {n: self._stored[n].detach().to(self._device) for n in {number for *_, number in places}}
                self._put({n: _like(self._absent[n], values) for n, values in here.items()}, places)
                yield
            finally:
                self._put(self._absent, places)

    @staticmethod
    def _put(weights: Any, places: list[_Place]) -> None:
        for owner, name, number in places:
            owner[name] = weights[number]


def _run_in(context: Callable[[], AbstractContextManager[None]], module: nn.Module) -> None:
    """Run a module in a context, by a subclass of its own, since Ctrl-C passes hooks by."""
    kind: Any = type(module)

    def call(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        with context():
            return kind.__call__(self, *inputs, **named)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


_Place = tuple[dict[str, Any], str, int]
"""A module's table of parameters or buffers, a name in it, and the number of what stands there."""


def _slots(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            yield from ((owner, name, weight) for name, weight in owner.items() if weight is not None)


def _like(weight: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, weight.requires_grad) if isinstance(weight, nn.Parameter) else values


def _on_disk(weights: Sequence[Tensor], folder: Path) -> Sequence[Tensor]:
    from accelerate.utils import offload_weight

    folder.mkdir()
    index: dict[str, Any] = {}
    for number, weight in enumerate(weights):
        offload_weight(weight.detach().cpu(), str(number), folder, index)
    return _Stored(folder, [index[str(number)] for number in range(len(weights))])


class _Stored(Sequence[Tensor]):
    """Weights on the disk, read when they are asked for."""

    def __init__(self, folder: Path, facts: list[Any]) -> None:
        self._folder, self._facts = folder, facts

    def __getitem__(self, number: Any) -> Any:
        from accelerate.utils import load_offloaded_weight

        return load_offloaded_weight(str(self._folder / f"{number}.dat"), self._facts[number])

    def __len__(self) -> int:
        return len(self._facts)


def _bytes(modules: Sequence[nn.Module]) -> int:
    tensors = {id(x): x for module in modules for *_, x in _slots(module)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _device(name: Any) -> str:
    """A device's name as torch writes it, or `disk`; refused if there is none here."""
    if name == DISK:
        return DISK
    try:
        accelerator = torch.accelerator.current_accelerator() if isinstance(name, int) else None
        device = torch.device(name if accelerator is None else f"{accelerator.type}:{name}")
        device = torch.empty(0, device=device).device  # with its number
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"device_map or max_memory names the device {name!r}, which cannot be used here ({error}). Name one that "
            "computes, such as 0, or 'cpu' or 'disk'."
        ) from error
    return str(device)


def check_whole(model: DiffusionLM, what: str) -> None:
    """Refuse what reads all weights of a model of which some lie elsewhere."""
    if model.backbone.is_offloaded:
        raise ConfigError(
            f"{what} needs all weights at once, but some lie elsewhere. Load the model without device_map."
        )
