"""Turn pretrained language models into diffusion language models; every scientific choice is a plugin.

Public is what is named here and in `l2d_framework.testing`; everything else may change without notice. Names are
imported when first used, so that importing this package costs neither torch nor plugins.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2d_framework import registry
    from l2d_framework.backbone import Backbone, BackboneConfig
    from l2d_framework.component import Component
    from l2d_framework.drafter import Ahead, Drafter
    from l2d_framework.errors import L2DError
    from l2d_framework.generation.results import Generation, Infilled
    from l2d_framework.guidance import Guidance
    from l2d_framework.hooks import hookimpl
    from l2d_framework.models.checkpoint import load, push_to_hub, save
    from l2d_framework.models.diffusion_lm import DiffusionLM
    from l2d_framework.parametrization import Parametrization, ParametrizationConfig
    from l2d_framework.schedule import NoiseLaw, Schedule, ScheduleConfig
    from l2d_framework.solver import Problem, Solver
    from l2d_framework.types import (
        Context,
        ForeignCheckpoint,
        Layout,
        Predict,
        Prediction,
        Query,
        Random,
        Space,
        Stride,
    )

    __version__: str

__all__ = [
    "Ahead",
    "Backbone",
    "BackboneConfig",
    "Component",
    "Context",
    "DiffusionLM",
    "Drafter",
    "ForeignCheckpoint",
    "Generation",
    "Guidance",
    "Infilled",
    "L2DError",
    "Layout",
    "NoiseLaw",
    "Parametrization",
    "ParametrizationConfig",
    "Predict",
    "Prediction",
    "Problem",
    "Query",
    "Random",
    "Schedule",
    "ScheduleConfig",
    "Solver",
    "Space",
    "Stride",
    "__version__",
    "hookimpl",
    "load",
    "push_to_hub",
    "registry",
    "save",
]

_HOMES = {
    "Ahead": "drafter",
    "Backbone": "backbone",
    "BackboneConfig": "backbone",
    "Component": "component",
    "Context": "types",
    "DiffusionLM": "models.diffusion_lm",
    "Drafter": "drafter",
    "ForeignCheckpoint": "types",
    "Generation": "generation.results",
    "Guidance": "guidance",
    "Infilled": "generation.results",
    "L2DError": "errors",
    "Layout": "types",
    "NoiseLaw": "schedule",
    "Parametrization": "parametrization",
    "ParametrizationConfig": "parametrization",
    "Predict": "types",
    "Prediction": "types",
    "Problem": "solver",
    "Query": "types",
    "Random": "types",
    "Schedule": "schedule",
    "ScheduleConfig": "schedule",
    "Solver": "solver",
    "Space": "types",
    "Stride": "types",
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
