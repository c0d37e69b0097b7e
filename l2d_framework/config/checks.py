"""What can be checked about a run before any weights are loaded."""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForCausalLM

from l2d_framework.backbone import Backbone
from l2d_framework.base_model import (
    LANGUAGE_MODEL,
    check_quantization,
    check_vocabulary,
    gguf_hint,
    load_config,
    load_tokenizer,
)
from l2d_framework.blame import naming_plugins
from l2d_framework.config.reward import RewardRun
from l2d_framework.config.runs import DiffusionRun, Run
from l2d_framework.config.sections import ModelSection, RowSource, ScratchSection
from l2d_framework.diffusion.sampling import check_block_size
from l2d_framework.errors import CheckpointError, ConfigError, UnsupportedModelError, suggest
from l2d_framework.opening import (
    adapter_base,
    adapter_places,
    check_published,
    looked_in,
    make_config,
    new_model,
    open_config,
)

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".txt", ".gz", ".zst", ".arrow")


def check_runs(runs: Sequence[Run]) -> None:
    """Check the runs of one file, whose later ones may build on the output of earlier ones."""
    for index, run in enumerate(runs):
        check_run(run, earlier=runs[:index])


def check_run(run: Run, *, earlier: Sequence[Run] = ()) -> None:
    """Check a run before any weights are loaded."""
    if run.output_dir is not None:
        _check_output(run.output_dir)
    for which, sources in (("train", run.data.train), ("eval", run.data.eval)) if run.data is not None else ():
        for i, source in enumerate(sources):
            _check_source(f"data.{which}.{i}", source)
    _check_trackers(run.training.report_to)
    lm_config = language_model_config(run, earlier)
    if isinstance(run, DiffusionRun):
        run.backbone.check(lm_config, run.block_size)
        check_block_size(run.backbone, lm_config, trained=run.block_size, wanted=run.sampling.block_size)
        backbone = _backbone(run, lm_config)
        check_quantization(lm_config, run.model.base, whole=backbone.trains_lm)
    elif run.model is not None:
        check_quantization(lm_config, run.model.base, whole=isinstance(run, RewardRun) or run.lora is None)
    if isinstance(run, RewardRun):
        _check_reward(run, lm_config)


def _check_output(output_dir: str) -> None:
    target = Path(output_dir).absolute()
    parent = next(path for path in (target, *target.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"output_dir: {output_dir!r} cannot be written ({parent}: {reason}); choose another"
        ) from error


def _check_source(where: str, source: RowSource) -> None:
    if not Path(source.path).exists() and not any(glob.iglob(source.path, recursive=True)):
        if _looks_local(source.path) or source.path.endswith(_DATA_SUFFIXES):
            raise ConfigError(f"{where}.path: no such file or folder, got {source.path!r}; check the path")
        if not _HUB_ID.fullmatch(source.path):
            raise ConfigError(f"{where}.path: neither a file, a folder nor a hub id, got {source.path!r}; check it")
    files, folder = source.data_files or [], Path(source.path)
    for patterns in files.values() if isinstance(files, dict) else [files]:
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            # Names without a folder of their own may lie on the hub, beside the data set.
            below = folder / pattern if folder.is_dir() else Path(pattern)
            if (_looks_local(pattern) or folder.is_dir()) and not glob.glob(str(below), recursive=True):
                raise ConfigError(f"{where}.data_files: no such file, got {pattern!r}; check the path")


def _check_trackers(names: Sequence[str]) -> None:
    if not names:
        return
    # Imports peft and looks for every tracker, which takes seconds.
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            hint = suggest(name, INTEGRATION_TO_CALLBACK) or ";"
            raise ConfigError(f"training.report_to: unknown tracker, got {name!r}{hint} known: {known}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"training.report_to: {name!r} is not installed. Run: pip install {name}")


def language_model_config(run: Run, earlier: Sequence[Run]) -> Any:
    """transformers config of the language model that a run starts from, which an earlier one may still have to make."""
    if run.model is None:
        assert run.scratch is not None  # a run has one of the two
        return _scratch_config(run.scratch)
    base = run.model.base
    stage = stage_before(base, earlier)
    if stage is None:
        return _saved_config(run.model)
    config = language_model_config(stage, earlier[: earlier.index(stage)])
    if isinstance(stage, DiffusionRun) and not _backbone(stage, config).trains_lm:
        raise ConfigError(
            f"model.base: {base!r} will hold a diffusion model without a language model of its own; start from "
            f"{stage.model.base!r}"
        )
    return config


def stage_before(base: str, earlier: Sequence[Run]) -> Run | None:
    """The run from whose output a later one starts, the last of those that write there."""
    outputs = {Path(stage.output_dir).absolute(): stage for stage in earlier if stage.output_dir is not None}
    return outputs.get(Path(base).absolute())


@naming_plugins()
def _backbone(run: DiffusionRun, lm_config: Any) -> Backbone:
    # On the meta device a backbone finds out what it cannot serve.
    with torch.device("meta"):
        try:
            lm = new_model(AutoModelForCausalLM, lm_config, attn_implementation=run.model.attn_implementation)
        except ValueError as error:
            raise UnsupportedModelError(
                f"model.base: {run.model.base!r} of type {lm_config.model_type!r} is no causal language model with "
                f"attn_implementation {run.model.attn_implementation!r} ({error}); choose another"
            ) from error
        backbone = run.backbone.build(lm.eval())
        run.parametrization.build(backbone.vocab_size, backbone.hidden_size)
        return backbone


def _check_reward(run: RewardRun, config: Any) -> None:
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UnsupportedModelError(
            f"model.base: {run.model.base!r} of type {config.model_type!r} is no text model that transformers can give "
            "a reward head; choose another"
        )
    limit = getattr(config, "max_position_embeddings", None)
    field = "max_length" if run.data.pad_to is None else "pad_to"
    length = run.data.pad_to or run.data.max_length
    if limit is not None and length > limit:
        raise ConfigError(
            f"data.{field}: exceeds the {limit} tokens this language model was made for, got {length}; lower it"
        )


def _scratch_config(scratch: ScratchSection) -> Any:
    fields = dict(scratch.config)
    family = fields.pop("model_type")
    if family not in CONFIG_MAPPING:
        raise ConfigError(
            f"scratch.config.model_type: unknown to transformers, got {family!r}{suggest(family, CONFIG_MAPPING)}"
        )
    plain = make_config(family, {"model_type": family})
    # transformers keeps unknown fields without a word, and a misspelt width would silently be the default one.
    known = {*plain.to_dict(), *plain.attribute_map}
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"scratch.config.{name}: unknown field of {family!r}, got {fields[name]!r}{suggest(name, known)}"
            )
    try:
        return make_config(family, scratch.config)
    except CheckpointError as error:
        raise ConfigError(f"scratch.config: transformers refuses it: {error}") from error


def _saved_config(model: ModelSection) -> Any:
    base, adapter = model.base, model.adapter
    folder = Path(base)
    adapter_is_here = adapter is not None and (_looks_local(adapter) or Path(adapter).exists())
    if adapter is not None and adapter_is_here:
        _check_adapter(adapter, "model.adapter")
    if folder.is_dir():
        check_published(folder)
        if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
            if adapter is not None:
                raise ConfigError(
                    f"model.adapter: {base!r} is itself an adapter, got also {adapter!r}; merge one first"
                )
            _check_adapter(base, "model.base")
            named = adapter_base(folder)
            try:
                return _saved_config(model.model_copy(update={"base": named, "revision": None, "adapter": base}))
            except ConfigError as error:
                if Path(named).is_dir():
                    raise
                looked = looked_in(named, adapter_places(folder))
                raise ConfigError(
                    f"{error}.{looked} The PEFT adapter {base!r} was trained on it: write where it lies now into its "
                    "adapter_config.json, as base_model_name_or_path"
                ) from error
        if not (folder / "config.json").exists() and (folder / LANGUAGE_MODEL).is_dir():
            return _saved_config(model.model_copy(update={"base": str(folder / LANGUAGE_MODEL)}))
        for needed in (("config.json",), _WEIGHTS) if model.gguf_file is None else ():
            if not any(any(folder.glob(pattern)) for pattern in needed):
                raise ConfigError(
                    f"model.base: folder {base!r} has no {' or '.join(needed)}; name a saved language model. "
                    f"{gguf_hint(folder)}".rstrip()
                )
    elif folder.is_file() and folder.suffix != ".gguf":
        raise ConfigError(
            f"model.base: {base!r} is a file. Give a folder with a model; that of a run file is its output_dir"
        )
    elif _looks_local(base) or not _HUB_ID.fullmatch(base):
        raise ConfigError(
            f"model.base: no such folder, got {base!r}; name where it lies, or a hub id such as 'org/model'"
        )
    try:
        if folder.is_dir() and (adapter is None or adapter_is_here):
            config = load_config(model)
            if (tokenizer := load_tokenizer(model)) is not None:
                check_vocabulary(tokenizer, config, base)
            return config
        gguf = {} if model.gguf_file is None else {"gguf_file": model.gguf_file}
        config = open_config(base, revision=model.revision, **gguf)
    except CheckpointError as error:
        raise ConfigError(
            f"model.base: no model can be read from {base!r}, which is a folder or a hub id; check the spelling, the "
            f"connection and access rights, or name where it lies now if it has moved ({error})"
        ) from error
    check_quantization(config, base)
    return config


def _check_adapter(adapter: str, where: str) -> None:
    folder = Path(adapter)
    check_published(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{where}: no PEFT adapter there, got {adapter!r}; name a folder with adapter_config.json")
    if not any(any(folder.glob(pattern)) for pattern in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ConfigError(f"{where}: {adapter!r} has no adapter_model.safetensors; save the adapter again")


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path
