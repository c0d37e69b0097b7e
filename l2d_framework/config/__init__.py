"""Run files: strict sections, presets, overrides, and everything that can be checked before weights are loaded."""

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
