"""A checkpoint or plain language model, opened without its weights: what can be refused early is refused here."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from l2d_framework.backbone import Backbone
from l2d_framework.base_model import empty_language_model, fetch, fingerprint, is_adapter, load_config, load_tokenizer
from l2d_framework.component import Component
from l2d_framework.config import DiffusionRun, SamplingSection
from l2d_framework.config.parsing import parse_run
from l2d_framework.config.sampling import component_of
from l2d_framework.diffusion.sampler import check_running
from l2d_framework.diffusion.sampling import check_block_size, check_sampling
from l2d_framework.errors import CheckpointError, ConfigError
from l2d_framework.generation import arguments
from l2d_framework.generation.speculation import Guesses
from l2d_framework.models.checkpoint import assemble, build_model, components, load
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.labels import MANIFEST
from l2d_framework.models.manifest import base_reference, opening_base, read_manifest, recorded_origin
from l2d_framework.models.placement import Placement, Plan
from l2d_framework.registry import registry

CLASS, HINT, SCALE = "class_name", "class_hint", "guidance_scale"
"""Options beside the fields of the `sampling` section; a hint is a class for the models that know it."""

_LOGGER = logging.getLogger(__name__)

_UNTRAINED = {
    "schedule": {"name": "linear"},
    "parametrization": {"name": "embedding"},
    "backbone": {"name": "two_stream"},
}


class UnloadedModel:
    """What a checkpoint is made of, or a plain language model, which serves where no evaluation is asked for."""

    def __init__(
        self,
        path: str,
        *,
        base: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.path, self.base, self.dtype, self.revision, self.placement = path, base, dtype, revision, placement
        folder = fetch(path, revision)
        self._run: DiffusionRun | None = None
        if (folder / MANIFEST).is_file() or not any(folder.glob("*config.json")):
            self.manifest = read_manifest(folder)
            self.reference = base_reference(folder, self.manifest, base=base, dtype=dtype)
        else:
            if base is not None and not is_adapter(folder):
                raise ConfigError(f"{path!r} is a whole language model, got base={base!r}. Leave base out.")
            fields = {"base": path, "revision": revision} if base is None else {"base": base, "adapter": str(folder)}
            fields |= {} if dtype is None else {"dtype": dtype}
            self._run = cast(DiffusionRun, parse_run({"model": fields, **_UNTRAINED}))
            self.reference = self._run.model
            fields = self._run.model_dump(mode="json", include={*_UNTRAINED, "block_size", "classes", "sampling"})
            self.manifest = fields | {"fingerprint": None, "chat_template": None, "ends": None, "files": {}}
        self.origin = recorded_origin(self.manifest, self.reference, self.manifest["fingerprint"])
        self.parts = components(self.manifest)
        with opening_base(folder, base, self.manifest):
            self.lm_config = load_config(self.reference)
        lm = empty_language_model(self.lm_config, self.reference.attn_implementation)
        with torch.device(lm.device):  # or matrices of random numbers would be drawn and dropped
            self.empty: Backbone = self.parts.backbone.build(lm).in_blocks(self.parts.block_size)
        self.classes = list(self.origin.classes)
        self._ignored: set[str] = set()
        self._beside: list[Component] = []
        tokenizer = load_tokenizer(self.reference)
        if tokenizer is None:
            raise ConfigError(
                f"This model has no tokenizer, so no text can be read. Save one in the folder of its base model, "
                f"{self.reference.base!r}."
            )
        if self.origin.chat_template is not None:
            tokenizer.chat_template = self.origin.chat_template
        self.tokenizer: PreTrainedTokenizerBase = tokenizer

    @property
    def is_plain(self) -> bool:
        """True for a language model that is no diffusion checkpoint."""
        return self._run is not None

    @property
    def is_block(self) -> bool:
        """True if there are no next-token logits, because noisy tokens see each other or blocks are read as such."""
        return self.parts.block_size != 1 or not self.empty.independent_positions

    def classed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options whose class hint became the class, for models that know it, or was dropped with a line in the log."""
        # `class_name` is strict and wins; a hint, which a task names for all models, is for those that know it.
        rest = dict(options)
        hint = rest.pop(HINT, None)
        if hint is None or rest.get(CLASS) is not None:
            return rest
        if not isinstance(hint, str):
            raise ConfigError(
                f"{HINT} must be the name of a class, got {hint!r}. Correct it in the task or --gen_kwargs."
            )
        if hint in self.classes:
            return rest | {CLASS: hint}
        if hint not in self._ignored:
            self._ignored.add(hint)
            known = f"knows the classes {self.classes}" if self.classes else "has no classes"
            _LOGGER.warning("%s=%r is ignored: the model %s.", HINT, hint, known)
        return rest

    def sampling(self, options: Mapping[str, Any]) -> SamplingSection:
        """Settings of a request."""
        backbone, state = self.parts.backbone, self.parts.parametrization
        fields = {name: value for name, value in options.items() if name not in (CLASS, SCALE)}
        settings = self.origin.settings(state, fields, scale=options.get(SCALE), tokenizer=self.tokenizer)
        self.origin.class_id(options.get(CLASS))
        # Whether a class is named, only a request can tell; a guidance that it asks for is not left without effect.
        is_asked = asks_to_guide(options)
        check_sampling(settings, num_classes=backbone.num_classes, has_condition=True, is_scaled=is_asked)
        check_block_size(backbone, self.lm_config, trained=self.parts.block_size, wanted=settings.block_size)
        if settings.num_inference_steps == 0 and not self.empty.identity_at_zero:
            raise ConfigError(
                f"num_inference_steps=0 means the plain language model, which backbone {backbone.component_name()!r} "
                "does not contain. Use at least 1."
            )
        if self.is_plain and settings.num_inference_steps != 0:
            raise CheckpointError(
                f"{self.path!r} holds no {MANIFEST}, so it is no diffusion checkpoint. Give the output_dir of a run, "
                "or use it as the plain language model it is with num_inference_steps=0."
            )
        return settings

    def check_class(self, settings: SamplingSection, *, is_named: bool, where: str, is_asked: bool = False) -> None:
        """Refuse a guidance towards a class that nobody named; one that is asked for even where it has no effect."""
        classes = self.parts.backbone.num_classes
        try:
            check_sampling(settings, num_classes=classes, has_condition=is_named, is_scaled=is_asked)
        except ConfigError as error:
            raise ConfigError(f"{error} The classes are {self.classes}. {where}") from error

    def check_running(
        self, running: Mapping[str, Any], settings: SamplingSection, *, device: Any = None, is_watched: bool = False
    ) -> None:
        """Refuse a way to run requests that there is not, or with which answers could come out differently.

        From then on `plan` leaves room for the models that it brings along.
        """
        request = arguments.request(**{**running, "drafter": component_of("drafter", running.get("drafter"))})
        if request.drafter is not None:
            request.drafter.check(self.tokenizer)
        self._beside = [part for part in (request.drafter, *settings.guidance) if part is not None]
        Guesses.of(self.empty, request, settings, block_size=self.parts.block_size, has_observer=is_watched)
        if settings.num_inference_steps != 0:
            self.empty.is_offloaded = self.placement is not None and any(self.plan(device).places)
            check_running(self.empty, merge=request.merge, compile=request.compile)

    def plan(self, device: Any) -> Plan:
        """Where everything will lie; the map of a placement may name the device that computes, if None is given."""
        if self.placement is None:
            return Plan.onto(device)
        lm = empty_language_model(self.lm_config, self.reference.attn_implementation, dtype=self.reference.dtype)
        beside = sum(part.bytes_beside(lm.dtype) for part in self._beside)
        return self.placement.plan(assemble(self.parts, lm), device, beside=beside)

    def load(self, device: Any) -> DiffusionLM:
        """Load the weights."""
        plan = self.plan(device)
        if self._run is not None:
            return plan.apply(build_model(self._run).eval())
        model = load(self.path, base=self.base, dtype=self.dtype, revision=self.revision, tokenizer=self.tokenizer)
        return plan.apply(model)

    def identity(self) -> dict[str, Any]:
        """What tells this model from others, JSON-ready: fingerprints, components, versions of package and plugins."""
        own = json.dumps(sorted(item for item in self.manifest["files"].items() if item[0].endswith(".safetensors")))
        return {
            "base_fingerprint": self.manifest["fingerprint"] or fingerprint(self.reference),
            "adapter_fingerprint": hashlib.sha256(own.encode()).hexdigest() if self.manifest["files"] else None,
            "components": {kind: self.manifest[kind] for kind in _UNTRAINED},
            "block_size": self.manifest["block_size"],
            "dtype": self.reference.dtype,
            "chat_template": self.manifest["chat_template"],
            "l2d_framework": version("l2d-framework"),
            "plugins": {row.distribution: row.version for row in registry().table() if row.status == "ok"},
        }


def asks_to_guide(options: Mapping[str, Any]) -> bool:
    """Whether a request itself names a guidance or its scale; those of presets may well have no effect."""
    return bool(options.get("guidance")) or options.get(SCALE) is not None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """What tells a tokenizer from others, wherever it lies."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    described = json.dumps([vocabulary, tokenizer.special_tokens_map], default=str)
    return hashlib.sha256(described.encode()).hexdigest()
