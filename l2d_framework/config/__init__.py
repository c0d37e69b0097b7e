"""Run files: strict sections, presets, overrides, and everything that can be checked before weights are loaded.

Names are imported when first used: what a run file says wrong is found without torch where plugins declare their names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2d_framework.config.checks import check_run, check_runs
    from l2d_framework.config.parsing import config_hash, load_run, parse_run, parse_stages, resolved_json
    from l2d_framework.config.reward import PairSource, RewardRun, SimplexNoise
    from l2d_framework.config.runs import DiffusionRun, LanguageModelRun, Run, TokenRun, json_schema
    from l2d_framework.config.sampling import SamplingSection, default_sampling, parse_sampling
    from l2d_framework.config.sections import (
        DataSection,
        DataSource,
        ModelSection,
        RowSource,
        ScratchSection,
        TrainingSection,
    )

__all__ = [
    "DataSection",
    "DataSource",
    "DiffusionRun",
    "LanguageModelRun",
    "ModelSection",
    "PairSource",
    "RewardRun",
    "RowSource",
    "Run",
    "SamplingSection",
    "ScratchSection",
    "SimplexNoise",
    "TokenRun",
    "TrainingSection",
    "check_run",
    "check_runs",
    "config_hash",
    "default_sampling",
    "json_schema",
    "load_run",
    "parse_run",
    "parse_sampling",
    "parse_stages",
    "resolved_json",
]

_HOMES = {
    "DataSection": "sections",
    "DataSource": "sections",
    "DiffusionRun": "runs",
    "LanguageModelRun": "runs",
    "ModelSection": "sections",
    "PairSource": "reward",
    "RewardRun": "reward",
    "RowSource": "sections",
    "Run": "runs",
    "SamplingSection": "sampling",
    "ScratchSection": "sections",
    "SimplexNoise": "reward",
    "TokenRun": "runs",
    "TrainingSection": "sections",
    "check_run": "checks",
    "check_runs": "checks",
    "config_hash": "parsing",
    "default_sampling": "sampling",
    "json_schema": "runs",
    "load_run": "parsing",
    "parse_run": "parsing",
    "parse_sampling": "sampling",
    "parse_stages": "parsing",
    "resolved_json": "parsing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
