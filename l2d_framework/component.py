"""The base of every plugin component: a frozen, strict pydantic model named by a `Literal`.

This module imports no torch, so that run files can be checked without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch


class Component(BaseModel):
    """A scientific choice that is its own configuration.

    A concrete component declares `name: Literal["..."] = "..."`; its kind is the interface it inherits from. Two equal
    components are interchangeable, and `model_dump_json` of one is all that a checkpoint stores of it.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[str] = ""
    """Name of the interface in a run file, set by each interface."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Import names this component needs beyond the core dependencies."""
    extra: ClassVar[str] = ""
    """What to install for them, such as `l2d-framework[solvers-rk]`."""

    @classmethod
    def component_name(cls) -> str:
        """Name by which run files refer to this component.

        Returns:
            The default of the `name` field.

        Raises:
            TypeError: if the class declares no `name: Literal[...]` with a default.
        """
        field = cls.model_fields.get("name")
        if field is None or not isinstance(field.default, str):
            raise TypeError(f'{cls.__qualname__} needs a field `name: Literal["..."] = "..."`.')
        return field.default

    @classmethod
    def missing_requirements(cls) -> list[str]:
        """Import names in `requires` that are not installed.

        Returns:
            The missing names, empty when the component can be used.
        """
        return [name for name in cls.requires if not _is_installed(name)]

    def bytes_beside(self, dtype: torch.dtype) -> int:
        """Size of the weights that it brings along, for which `device_map="auto"` leaves room.

        Args:
            dtype: of the language model's weights.

        Returns:
            Bytes on the device that computes, 0 unless a component has a model of its own.
        """
        return 0

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary of this component.

        Returns:
            Every field, defaults included, so that a later change of a default cannot change an old checkpoint.
        """
        return self.model_dump(mode="json")


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """One section of a configuration laid over another.

    Args:
        old: values to fall back on.
        new: values that win; sections are merged in turn, but one that names another component replaces the old one.

    Returns:
        The combined section; the arguments stay as they are.
    """
    if "name" in new and new["name"] != old.get("name"):
        return dict(new)
    out = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
        out[key] = merged(old[key], value) if both else value
    return out


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is missing
        return False
