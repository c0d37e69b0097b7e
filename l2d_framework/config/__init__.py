"""Run files: strict sections, presets, overrides, and everything that can be checked before weights are loaded."""

from l2d_framework.config.checks import check_run, check_runs
from l2d_framework.config.parsing import config_hash, load_run, parse_run, parse_stages, resolved_json
from l2d_framework.config.runs import DiffusionRun, LanguageModelRun, Pipeline, Run, json_schema
from l2d_framework.config.sampling import SamplingSection, default_sampling, parse_sampling
from l2d_framework.config.sections import (
    DataSection,
    DataSource,
    LoraSection,
    ModelSection,
    ScratchSection,
    Section,
    TokenizerSection,
    TrainingSection,
)

__all__ = [
    "DataSection",
    "DataSource",
    "DiffusionRun",
    "LanguageModelRun",
    "LoraSection",
    "ModelSection",
    "Pipeline",
    "Run",
    "SamplingSection",
    "ScratchSection",
    "Section",
    "TokenizerSection",
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
