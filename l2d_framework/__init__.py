"""Turn pretrained language models into diffusion language models; every scientific choice is a plugin.

Names are imported when first used, so that importing this package costs neither torch nor plugins.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2d_framework import registry
    from l2d_framework.backbone import Backbone, BackboneConfig
    from l2d_framework.component import Component
    from l2d_framework.guidance import Guidance
    from l2d_framework.hooks import hookimpl
    from l2d_framework.models.checkpoint import load, push_to_hub, save
    from l2d_framework.models.diffusion_lm import DiffusionLM
    from l2d_framework.parametrization import Parametrization, ParametrizationConfig
    from l2d_framework.schedule import NoiseLaw, Schedule, ScheduleConfig
    from l2d_framework.solver import Solver
    from l2d_framework.types import Layout, Prediction, Query

    __version__: str

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Component",
    "DiffusionLM",
    "Guidance",
    "Layout",
    "NoiseLaw",
    "Parametrization",
    "ParametrizationConfig",
    "Prediction",
    "Query",
    "Schedule",
    "ScheduleConfig",
    "Solver",
    "__version__",
    "hookimpl",
    "load",
    "push_to_hub",
    "registry",
    "save",
]

_HOMES = {
    "Backbone": "backbone",
    "BackboneConfig": "backbone",
    "Component": "component",
    "DiffusionLM": "models.diffusion_lm",
    "Guidance": "guidance",
    "Layout": "types",
    "NoiseLaw": "schedule",
    "Parametrization": "parametrization",
    "ParametrizationConfig": "parametrization",
    "Prediction": "types",
    "Query": "types",
    "Schedule": "schedule",
    "ScheduleConfig": "schedule",
    "Solver": "solver",
    "hookimpl": "hooks",
    "load": "models.checkpoint",
    "push_to_hub": "models.checkpoint",
    "save": "models.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("l2d-framework")
    if name == "registry":
        return importlib.import_module("l2d_framework.registry")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
