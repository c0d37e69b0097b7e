"""A checkpoint or plain language model, opened without its weights: what can be refused early is refused here."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from l2d_framework.backbone import Backbone
from l2d_framework.base_model import empty_language_model, fetch, fingerprint, load_config, load_tokenizer
from l2d_framework.config import DiffusionRun, ModelSection, SamplingSection, default_sampling, parse_sampling
from l2d_framework.config.parsing import parse_run
from l2d_framework.diffusion.sampling import check_sampling
from l2d_framework.errors import CheckpointError, ConfigError, suggest
from l2d_framework.models.checkpoint import build_model, load
from l2d_framework.models.diffusion_lm import DiffusionLM, rescaled
from l2d_framework.models.manifest import MANIFEST, base_reference, read_manifest
from l2d_framework.registry import registry

CLASS, HINT, SCALE = "class_name", "class_hint", "guidance_scale"
"""Options beside the fields of the `sampling` section; a hint is a class for the models that know it."""

_LOGGER = logging.getLogger(__name__)

_UNTRAINED = {
    "schedule": {"name": "linear"},
    "parametrization": {"name": "embedding"},
    "backbone": {"name": "two_stream"},
}


class Source:
    """What a model is made of.

    Args:
        pretrained: checkpoint folder or hub id; a plain language model serves where no evaluation is asked for.
        base: where the base model lies now.
        dtype: of the weights; as recorded when None.
        revision: of a hub repository.

    Attributes:
        tokenizer: of the base model, with the chat template of the training.
        lm_config: transformers config of the base model.
        classes: names of the class labels.
    """

    def __init__(self, pretrained: str, *, base: str | None, dtype: str | None, revision: str | None) -> None:
        self.path, self.base, self.dtype, self.revision = pretrained, base, dtype, revision
        folder = fetch(pretrained, revision)
        self._run: DiffusionRun | None = None
        if (folder / MANIFEST).is_file():
            self.manifest = read_manifest(folder)
            self.reference = base_reference(folder, self.manifest, base=base, dtype=dtype)
        else:
            fields = {"base": pretrained, "revision": revision} | ({} if dtype is None else {"dtype": dtype})
            self._run = cast(DiffusionRun, parse_run({"model": fields, **_UNTRAINED}))
            self.reference = self._run.model
            self.manifest = {
                "fingerprint": None,
                "block_size": self._run.block_size,
                "classes": [],
                "chat_template": None,
                "sampling": self._run.sampling.model_dump(mode="json"),
                "files": {},
                **{kind: getattr(self._run, kind).to_json() for kind in _UNTRAINED},
            }
        self.lm_config = load_config(self.reference)
        parametrization: Any = registry().create("parametrization", self.manifest["parametrization"])
        backbone: Any = registry().create("backbone", self.manifest["backbone"])
        section = self.manifest["sampling"]
        self._section = parse_sampling(section) if section else default_sampling(parametrization)
        self._parametrization, self._backbone = parametrization, backbone
        self.empty: Backbone = backbone.build(empty_language_model(self.lm_config, self.reference.attn_implementation))
        self.classes: list[str] = list(self.manifest["classes"])
        self._ignored: set[str] = set()
        self.tokenizer = self._tokenizer()

    @property
    def is_plain(self) -> bool:
        """True for a language model that is no diffusion checkpoint."""
        return self._run is not None

    @property
    def is_block(self) -> bool:
        """True if there are no next-token logits, because noisy tokens see each other or blocks are read as such."""
        return bool(self.manifest["block_size"] != 1 or not self.empty.independent_positions)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.reference)
        if tokenizer is None:
            raise ConfigError(
                f"The base model {self.reference.base!r} has no tokenizer, so no task can be read. Save one in its "
                "folder."
            )
        if self.manifest["chat_template"] is not None:
            tokenizer.chat_template = self.manifest["chat_template"]
        return tokenizer

    def classed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options whose class hint became the class, or was dropped.

        `class_name` is strict and wins: a model that does not know it refuses. `class_hint`, which a task's
        `generation_kwargs` name for all models, is the class of a model that knows it; others ignore it and log one
        line.

        Args:
            options: of a request.

        Returns:
            A copy without `class_hint`.

        Raises:
            ConfigError: if the hint is no text.
        """
        found = dict(options)
        hint = found.pop(HINT, None)
        if hint is None or found.get(CLASS) is not None:
            return found
        if not isinstance(hint, str):
            raise ConfigError(
                f"{HINT} must be the name of a class, got {hint!r}. Correct it in the task or --gen_kwargs."
            )
        if hint in self.classes:
            return found | {CLASS: hint}
        if hint not in self._ignored:
            self._ignored.add(hint)
            known = f"knows the classes {self.classes}" if self.classes else "has no classes"
            _LOGGER.warning("%s=%r is ignored: the model %s.", HINT, hint, known)
        return found

    def sampling(self, options: Mapping[str, Any]) -> SamplingSection:
        """Settings of a request.

        Args:
            options: fields of the `sampling` section, `class_name` and `guidance_scale`.

        Returns:
            Complete settings.

        Raises:
            ConfigError: if they do not fit the model.
            CheckpointError: if this is a plain language model and evaluations of a network are asked for.
        """
        fields = {name: value for name, value in options.items() if name not in (CLASS, SCALE)}
        found = self._section.resolve(self._parametrization, fields)
        if options.get(SCALE) is not None:
            found = rescaled(found, options[SCALE])
        label = options.get(CLASS)
        if label is not None and label not in self.classes:
            hint = suggest(str(label), self.classes) or "."
            raise ConfigError(f"Unknown {CLASS} {label!r}{hint} This model knows {self.classes}.")
        # Whether a class is named, only a request can tell.
        check_sampling(found, num_classes=self._backbone.num_classes, has_condition=True)
        for guidance in found.guidance:
            guidance.check(self.tokenizer)
        if found.num_inference_steps == 0 and not self.empty.identity_at_zero:
            raise ConfigError(
                f"num_inference_steps=0 means the plain language model, which backbone "
                f"{self._backbone.component_name()!r} does not contain. Use at least 1."
            )
        if self.is_plain and found.num_inference_steps != 0:
            raise CheckpointError(
                f"{self.path!r} holds no {MANIFEST}, so it is no diffusion checkpoint. Give the output_dir of a run, "
                "or evaluate it as the plain language model it is with num_inference_steps=0."
            )
        return found

    def check_class(self, settings: SamplingSection, label: str | None) -> None:
        """Refuse a guidance towards a class that nobody named.

        Args:
            settings: of a request.
            label: its class.

        Raises:
            ConfigError: if it is missing.
        """
        for guidance in settings.guidance:
            if label is None and guidance.needs_classes and guidance.scale != guidance.neutral_scale:
                raise ConfigError(
                    f"Guidance {guidance.component_name()!r} with scale {guidance.scale:g} guides towards a class, and "
                    f"none is named. Add {CLASS}=NAME to --gen_kwargs or --model_args, one of {self.classes}, or leave "
                    f"{SCALE} out. A task proposes a class as {HINT}."
                )

    def load(self, device: Any) -> DiffusionLM:
        """Load the weights.

        Args:
            device: where to.

        Returns:
            The model in evaluation mode.
        """
        if self._run is not None:
            return build_model(self._run).to(device).eval()
        return load(self.path, base=self.base, dtype=self.dtype, device=device, revision=self.revision)

    def identity(self) -> dict[str, Any]:
        """What tells this model from others, JSON-ready.

        Returns:
            Fingerprints of base and own weights, components, type of the weights, versions of package and plugins.
        """
        reference: ModelSection = self.reference
        own = json.dumps(sorted(item for item in self.manifest["files"].items() if item[0].endswith(".safetensors")))
        return {
            "base_fingerprint": self.manifest["fingerprint"] or fingerprint(reference),
            "adapter_fingerprint": hashlib.sha256(own.encode()).hexdigest() if self.manifest["files"] else None,
            "components": {kind: self.manifest[kind] for kind in _UNTRAINED},
            "block_size": self.manifest["block_size"],
            "dtype": reference.dtype,
            "chat_template": self.manifest["chat_template"],
            "l2d_framework": version("l2d-framework"),
            "plugins": _plugins(),
        }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """What tells a tokenizer from others, wherever it lies.

    Args:
        tokenizer: of transformers.

    Returns:
        Hexadecimal digest.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = [
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        tokenizer.special_tokens_map,
    ]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


def _plugins() -> dict[str, str]:
    """Versions of the distributions whose components can be used."""
    return {row.distribution: row.version for row in registry().table() if row.status == "ok"}
