"""Checkpoints: a JSON manifest, safetensors and a PEFT adapter folder; never pickle, never a frozen model's weights.

A backbone that trains the language model itself has it stored beside them as a transformers folder.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from l2d_framework.base_model import (
    LANGUAGE_MODEL,
    check_quantization,
    check_vocabulary,
    empty_language_model,
    fetch,
    fingerprint,
    load_config,
    load_language_model,
    load_tokenizer,
    trained_in,
)
from l2d_framework.blame import naming_plugins
from l2d_framework.config import DiffusionRun, ModelSection
from l2d_framework.config.validation import validated
from l2d_framework.errors import CheckpointError
from l2d_framework.generation.prompts import read_template
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.labels import MANIFEST
from l2d_framework.models.manifest import (
    CARD,
    FORMAT,
    WEIGHTS,
    base_reference,
    file_hash,
    holds_language_model,
    opened_files,
    opening_base,
    read_manifest,
    recorded_origin,
    sealed,
)
from l2d_framework.models.origin import Origin
from l2d_framework.models.placement import DeviceMap, Placement, Plan, check_whole
from l2d_framework.opening import TRAINED_IN, open_model, reading
from l2d_framework.registry import registry

ADAPTER = "adapter"
_SCHEDULE = "schedule."
_CARD_TEXT = """---
library_name: l2d-framework
pipeline_tag: text-generation
tags: [diffusion, l2d-framework]{base_model}
---

# Diffusion language model

{about}

```python
import l2d_framework as l2d

lm = l2d.load("PATH_OR_HUB_ID")
print(lm.tokenizer.decode(lm.generate(["Hello"], max_new_tokens=32).sequences[0]))
```

{parts}

{notes}"""


@naming_plugins()
def build_model(run: DiffusionRun, *, meta: bool = False) -> DiffusionLM:
    """Diffusion model over a base model, new or going on from a diffusion checkpoint; with `meta` its shapes only."""
    config = load_config(run.model)
    if meta:
        model, tokenizer = empty_model(run, config), None
    else:
        run.backbone.check(config, run.block_size)
        tokenizer = load_tokenizer(run.model)
        if tokenizer is not None:
            check_vocabulary(tokenizer, config, run.model.base)
        model = assemble(run, load_language_model(run.model), run.seed)
    if not meta and ((folder := fetch(run.model.base, run.model.revision)) / MANIFEST).is_file():
        _go_on(model, run, folder)
    model.origin = Origin(
        model=run.model,
        fingerprint=None if meta else fingerprint(run.model),
        classes=tuple(run.classes),
        sampling=run.sampling,
        chat_template=None if run.data is None else read_template(run.data.chat_template),
    )
    model.tokenizer = tokenizer
    return model


@naming_plugins()
def empty_model(run: DiffusionRun, config: PreTrainedConfig) -> DiffusionLM:
    """Shapes, on the meta device, of a new diffusion model over a language model of this config."""
    run.backbone.check(config, run.block_size)
    lm = empty_language_model(config, run.model.attn_implementation, dtype=run.model.dtype)
    return assemble(run, lm, run.seed)


def _go_on(model: DiffusionLM, run: DiffusionRun, folder: Path) -> None:
    manifest = read_manifest(folder)
    for kind in ("parametrization", "backbone"):
        earlier, wanted = manifest[kind].get("name"), getattr(run, kind).component_name()
        if earlier != wanted:
            raise CheckpointError(
                f"model.base: {run.model.base!r} is a diffusion model with {kind} {earlier!r}, but the run asks for "
                f"{wanted!r}. Make them agree, or start from a language model."
            )
    _load_own(model, folder, schedule=manifest["schedule"] == model.schedule.config.to_json())


def assemble(parts: Any, lm: PreTrainedModel, seed: int = 0) -> DiffusionLM:
    """Diffusion model of the components of a run or manifest; the caller's random numbers do not change for it."""
    with torch.random.fork_rng(devices=[]), torch.device(lm.device):
        torch.manual_seed(seed)
        backbone = parts.backbone.build(lm)
        check_quantization(lm.config, str(lm.config.name_or_path), whole=backbone.trains_lm or None)
        parametrization = parts.parametrization.build(backbone.vocab_size, backbone.hidden_size)
        schedule = parts.schedule.build()
    return DiffusionLM(schedule, parametrization, backbone, parts.block_size)


def save(model: DiffusionLM, folder: str | Path, *, notes: str = "", dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint.

    Every file is written to a temporary folder beside its target and renamed, the manifest with the hashes of all
    others last, so an interrupted save leaves either the old checkpoint or one that `load` recognises as incomplete.

    Args:
        model: the model.
        folder: where to; made when missing.
        notes: markdown to append to the model card.
        dtype: of the weights in the files; as they are when None.
    """
    check_whole(model, "Saving")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".l2d-", dir=folder))
    try:
        adapter = model.backbone.peft_adapter()
        if model.backbone.trains_lm:
            save_language_model(model.backbone.lm, model.tokenizer, stage / LANGUAGE_MODEL, dtype)
        if adapter is not None:
            peft_config, state = adapter
            base = model.origin.model
            peft_config.base_model_name_or_path = None if base is None else base.base
            peft_config.save_pretrained(str(stage / ADAPTER))
            save_file(_plain(state, dtype), stage / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
        save_file(_plain(_own(model), dtype) | _plain(_learned(model)), stage / WEIGHTS, metadata={"format": "pt"})
        files = [path.relative_to(stage) for path in sorted(stage.rglob("*")) if path.is_file()]
        hashes = {path.as_posix(): file_hash(stage / path) for path in files}
        manifest = sealed(to_manifest(model) | {"files": hashes})
        (stage / CARD).write_text(_model_card(model, notes), encoding="utf-8")
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if model.backbone.trains_lm:
            # Those of an earlier save, such as shards and files of another tokenizer, would be opened with the new.
            for name in opened_files(folder) - hashes.keys():
                if (folder / name).is_file():
                    (folder / name).unlink()
        for path in [*files, Path(CARD), Path(MANIFEST)]:
            # safetensors makes files that only their owner can read.
            shutil.copymode(stage / MANIFEST, stage / path)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / path, folder / path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _own(model: DiffusionLM) -> dict[str, Tensor]:
    """Weights that are neither the adapter's nor the language model's, which have files of their own."""
    adapter = model.backbone.peft_adapter()
    elsewhere = {tensor.data_ptr() for tensor in (adapter[1] if adapter else {}).values()}
    if model.backbone.trains_lm:
        elsewhere |= {parameter.data_ptr() for parameter in model.backbone.lm.parameters()}
    own = {name: p for name, p in model.own_parameters().items() if p.data_ptr() not in elsewhere}
    return {name: value for name, value in own.items() if not name.startswith(_SCHEDULE)}


def _learned(model: DiffusionLM) -> dict[str, Tensor]:
    """What a schedule has learned, which keeps its precision in every file."""
    law = model.schedule
    return {_SCHEDULE + name: v for name, v in law.state_dict().items()} if isinstance(law, nn.Module) else {}


def save_language_model(
    lm: Any, tokenizer: PreTrainedTokenizerBase | None, folder: Path, dtype: torch.dtype | None
) -> None:
    """Write a transformers folder whose weights have the given type, and leave the model as it is."""
    if dtype in (None, lm.dtype):
        lm.save_pretrained(folder)
    else:
        # One tensor for each, so that tied weights stay tied.
        made: dict[int, Tensor] = {}
        state = {
            name: made.setdefault(weight.data_ptr(), weight.to(dtype) if weight.is_floating_point() else weight)
            for name, weight in lm.state_dict().items()
        }
        lm.save_pretrained(folder, state_dict=state)
        config = copy.deepcopy(lm.config)
        config.dtype = dtype  # transformers has written that of the model
        config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _plain(state: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: value.detach().cpu().to(dtype or value.dtype).contiguous() for name, value in state.items()}


def to_manifest(model: DiffusionLM) -> dict[str, Any]:
    """Everything a checkpoint says besides weights."""
    origin = model.origin
    return {
        "format": FORMAT,
        "l2d_framework": version("l2d-framework"),
        "model": None if origin.model is None else origin.model.model_dump(mode="json"),
        TRAINED_IN: trained_in(origin.model),
        "fingerprint": origin.fingerprint,
        "schedule": model.schedule.config.to_json(),
        "parametrization": model.parametrization.config.to_json(),
        "backbone": model.backbone.config.to_json(),
        "block_size": model.block_size,
        "classes": list(origin.classes),
        "sampling": None if origin.sampling is None else origin.sampling.model_dump(mode="json"),
        "chat_template": origin.chat_template,
        "ends": None if origin.ends is None else list(origin.ends),
    }


def _model_card(model: DiffusionLM, notes: str = "") -> str:
    base = model.origin.model.base if model.origin.model is not None else None
    own = sum(p.numel() for p in model.own_parameters().values())
    rest = "which is part of them" if model.backbone.trains_lm else "whose weights are not part of this repository"
    is_hub = base is not None and not Path(base).exists() and base.count("/") == 1
    config = model.schedule.config, model.parametrization.config, model.backbone.config
    schedule, state, network = (part.component_name() for part in config)
    return _CARD_TEXT.format(
        base_model=f"\nbase_model: {base}" if is_hub else "",
        about=f"{own:,} trained parameters over `{base}`, {rest}.",
        parts=f"Schedule `{schedule}`, parametrization `{state}`, backbone `{network}`.",
        notes=notes,
    )


def load(
    path: str | Path,
    *,
    base: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> DiffusionLM:
    """Load a checkpoint; its base model is named in the manifest and must have the recorded fingerprint.

    Args:
        path: checkpoint folder or hub id.
        base: where the base model lies now, if it has moved.
        dtype: of the weights; the run file's when None.
        device: where to put the model; the CPU when None.
        revision: of a hub checkpoint.
        tokenizer: the base model's, where it has been read already; a large vocabulary takes most of a second.
        device_map: for a model that is larger than the device: `auto`, or where modules of the language model lie, as
            in transformers: the device that computes, `cpu` or `disk`. Layers elsewhere come in when they run.
        max_memory: most memory of a device for `auto`, in bytes or as `10GiB`; what is free when None.
        offload_folder: where layers on the disk are kept while the model lives.

    Returns:
        The model in evaluation mode. Its own weights have the type they are trained in, whatever the files' type, so
        saving it again loses nothing.

    Raises:
        CheckpointError: if the checkpoint is damaged or belongs to another base model.
    """
    placement = Placement.of(device_map, max_memory, offload_folder)
    folder = fetch(str(path), revision)
    manifest = read_manifest(folder)
    chosen = None if dtype is None else str(dtype).removeprefix("torch.")
    reference = base_reference(folder, manifest, base=base, dtype=chosen)
    is_inside = holds_language_model(manifest)
    with opening_base(folder, base, manifest):
        here = manifest["fingerprint"] if is_inside else fingerprint(reference)
    # A model put together by hand has read no base files, so it could record no fingerprint.
    if manifest["fingerprint"] not in (None, here):
        raise CheckpointError(
            f"The base model {reference.base!r} has fingerprint {here[:12]}, but this checkpoint was trained on "
            f"{str(manifest['fingerprint'])[:12]}. Pass the right model as `base`."
        )
    config = load_config(reference)
    with reading(f"what {str(folder / MANIFEST)!r} describes"):
        parts = components(manifest)
        parts.backbone.check(config, parts.block_size)
        plan = Plan.onto(device)
        if placement is not None:
            empty = empty_language_model(config, reference.attn_implementation, dtype=reference.dtype)
            plan = placement.plan(assemble(parts, empty), device)
        model = assemble(parts, load_language_model(reference))
    _load_own(model, folder)
    recorded = manifest["model"] and validated(ModelSection, manifest["model"], "model")
    model.origin = recorded_origin(manifest, recorded if is_inside else reference, here)
    model.tokenizer = tokenizer or load_tokenizer(reference)
    return plan.apply(model.eval())


def components(manifest: dict[str, Any]) -> SimpleNamespace:
    """Components that a manifest names, under the names that they have in a run."""
    created = {kind: registry().create(kind, manifest[kind]) for kind in ("schedule", "parametrization", "backbone")}
    return SimpleNamespace(**created, block_size=manifest["block_size"])


def load_weights(model: DiffusionLM, folder: str | Path) -> None:
    """Read a checkpoint's weights into a model of the same shape."""
    _load_own(model, Path(folder))
    if model.backbone.trains_lm:
        lm: Any = model.backbone.lm
        inside = Path(folder) / LANGUAGE_MODEL
        with reading(f"the language model in {str(inside)!r}", inside):
            lm.load_state_dict(open_model(type(lm), inside, dtype=lm.dtype)[0].state_dict())


def _load_own(model: DiffusionLM, folder: Path, *, schedule: bool = True) -> None:
    adapter = model.backbone.peft_adapter()
    targets: dict[str, Tensor] = {} if adapter is None else dict(adapter[1])
    targets |= _own(model) | (_learned(model) if schedule else {})
    stored: dict[str, Tensor] = {}
    for path in [folder / WEIGHTS] + ([folder / ADAPTER / "adapter_model.safetensors"] if adapter else []):
        try:
            stored |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(path)!r} is missing or damaged ({error}). Copy it again.") from error
    if not schedule:  # a run may go on with another one
        stored = {name: value for name, value in stored.items() if not name.startswith(_SCHEDULE)}
    shapes, wanted = ({name: value.shape for name, value in state.items()} for state in (stored, targets))
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if wrong:
        raise CheckpointError(
            f"{str(folder)!r} does not fit this model: {len(wrong)} tensors are missing, superfluous or of another "
            f"shape, such as {wrong[0]!r}. Use the run file it was trained with."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(stored[name])


def push_to_hub(model: DiffusionLM, repo_id: str, *, private: bool = False, notes: str = "") -> str:
    """Upload a checkpoint to "org/name" on the Hugging Face hub, made when missing; returns the commit's address."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, notes=notes)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
