"""The kinds of run and the pipeline that chains them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, Field, SerializeAsAny, TypeAdapter, model_validator

from l2d_framework.component import Component
from l2d_framework.config.reference import DescribedSchema
from l2d_framework.config.reward import RewardRun, reward_type
from l2d_framework.config.sampling import SamplingSection, component_type, sampling_type
from l2d_framework.config.sections import (
    DataSection,
    LoraSection,
    ModelSection,
    OutputFolder,
    ScratchSection,
    Section,
    TrainingSection,
    optional,
    specialised,
)
from l2d_framework.registry import Registry, registry

if TYPE_CHECKING:
    from l2d_framework.backbone import BackboneConfig
    from l2d_framework.parametrization import ParametrizationConfig
    from l2d_framework.schedule import ScheduleConfig
else:
    # The interfaces import torch; `diffusion_type` puts the installed components here.
    BackboneConfig = ParametrizationConfig = ScheduleConfig = Component


class DiffusionRun(Section):
    """Turning a language model into a diffusion language model."""

    model_config = ConfigDict(json_schema_extra=optional("sampling"))

    kind: Literal["diffusion"] = "diffusion"
    model: ModelSection
    """The language model to start from."""
    schedule: SerializeAsAny[ScheduleConfig]
    """How much noise there is at which time; the method's where the run file names a `method`."""
    parametrization: SerializeAsAny[ParametrizationConfig]
    """The state space in which tokens are diffused; the method's where the run file names a `method`."""
    backbone: SerializeAsAny[BackboneConfig]
    """The network that denoises, and how much of it is trained; the method's where the run file names a `method`."""
    block_size: int | None = Field(default=1, ge=1)
    """Tokens denoised together, in sight of the blocks before; one block per sequence when None. 1 for L2D, None for
    TESS 2."""
    classes: list[str] = Field(default_factory=list)
    """Names of the class labels, in the order of their ids."""
    sampling: SamplingSection
    """How to sample where a request says nothing else."""
    data: DataSection | None = None
    """What to learn from; needed to train."""
    training: TrainingSection = TrainingSection()
    """How to train."""
    output_dir: OutputFolder = None
    seed: int = Field(default=0, ge=0)
    """Of new weights, the order of the data, what is held out, and all noise in training."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_training(self.data, self.training)
        if not isinstance(self.backbone, Component):
            return self  # no plugins are loaded yet: the run will be made once more
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes names one class twice, got {self.classes}; remove one")
        count = getattr(self.backbone, "num_classes", None)
        if self.classes and count != len(self.classes):
            raise ValueError(
                f"classes has {len(self.classes)} names but backbone {self.backbone.component_name()!r} has "
                f"{count or 'no'} classes; make them agree"
            )
        for guidance in self.sampling.guidance:
            if guidance.needs_classes and not self.classes and guidance.scale != guidance.neutral_scale:
                raise ValueError(
                    f"guidance {guidance.component_name()!r} at scale {guidance.scale} needs a model with classes; "
                    "name them in classes, or remove it"
                )
        for source in (*self.data.train, *self.data.eval) if self.data else ():
            if source.class_column and not self.classes:
                raise ValueError(
                    f"class_column {source.class_column!r} is given but classes is empty; name the classes"
                )
            if source.class_name is not None and source.class_name not in self.classes:
                raise ValueError(
                    f"class_name {source.class_name!r} is none of classes {self.classes}; add or correct it"
                )
        strangers = sorted(set(self.data.class_map.values()) - set(self.classes)) if self.data else []
        if strangers:
            raise ValueError(
                f"data.class_map leads to {strangers}, which classes {self.classes} lacks; add or map them"
            )
        return self


class LanguageModelRun(Section):
    """Plain next-token training: from scratch, of all weights, or of a LoRA."""

    kind: Literal["language_model"] = "language_model"
    model: ModelSection | None = None
    """The language model to go on from; or `scratch`."""
    scratch: ScratchSection | None = None
    """A language model and its tokenizer to train from nothing; or `model`."""
    lora: LoraSection | None = None
    """Train a LoRA of this shape instead of all weights."""
    data: DataSection | None = None
    """What to learn from; needed to train."""
    training: TrainingSection = TrainingSection()
    """How to train."""
    output_dir: OutputFolder = None
    seed: int = Field(default=0, ge=0)
    """Of new weights, the order of the data and what is held out."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_training(self.data, self.training)
        if (self.model is None) == (self.scratch is None):
            raise ValueError(f"give either model or scratch, got {'neither' if self.model is None else 'both'}")
        if self.data is not None and self.data.masking is not None:
            raise ValueError("data.masking is for diffusion; a language model learns every next token. Remove it")
        if self.scratch and self.lora:
            raise ValueError("lora needs a model to adapt, got scratch; remove one of them")
        return self


TokenRun = DiffusionRun | LanguageModelRun
"""Runs that learn to predict tokens."""

Run = TokenRun | RewardRun


class Pipeline(Section):
    """Runs that follow each other; a later one may start from the `output_dir` of an earlier one."""

    stages: list[SerializeAsAny[Run]] = Field(min_length=1)
    """The runs, in the order in which they are trained."""


@cache
def diffusion_type(plugins: Registry | None) -> type[DiffusionRun]:
    """Diffusion run whose components are unions over plugins, or anything while none are loaded."""
    return specialised(
        DiffusionRun,
        schedule=(component_type(plugins, "schedule"), ...),
        parametrization=(component_type(plugins, "parametrization"), ...),
        backbone=(component_type(plugins, "backbone"), ...),
        sampling=(sampling_type(plugins), ...),
    )


def json_schema() -> dict[str, Any]:
    """JSON schema of a run file, complete for the installed plugins."""
    run: Any = diffusion_type(registry()) | LanguageModelRun | reward_type(registry())
    stages: Any = (list[run], Field(min_length=1))
    either: Any = run | specialised(Pipeline, stages=stages)
    schema = TypeAdapter(either).json_schema(schema_generator=DescribedSchema)
    for name, part in schema.get("$defs", {}).items():
        if name == "DiffusionRun":
            part["properties"]["method"] = {
                "oneOf": [
                    {"const": name, "description": str(fields.get("description", ""))}
                    for name, fields in registry().methods().items()
                ],
                "default": None,
                "description": "Method whose components and settings this run has where it names no others.",
            }
            parts = ["schedule", "parametrization", "backbone"]
            part["required"] = [field for field in part["required"] if field not in parts]
            part["anyOf"] = [{"required": ["method"]}, {"required": parts}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Run file of l2d-framework", **schema}


def _check_training(data: DataSection | None, training: TrainingSection) -> None:
    if data is None:
        return
    if data.streaming and training.max_steps is None:
        raise ValueError("data.streaming has no known length; set training.max_steps")
    if training.batch_size % data.shards:
        raise ValueError(
            f"training.batch_size {training.batch_size} is no multiple of data.shards {data.shards}; change one"
        )
    if training.eval_steps and not data.eval and not data.eval_fraction:
        raise ValueError(f"training.eval_steps is {training.eval_steps} but nothing is held out; set data.eval")
