"""Conversion of other code bases' checkpoints into this package's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from l2d_framework.base_model import fetch
from l2d_framework.checkpoint import build_model, save
from l2d_framework.config import DiffusionRun, parse_run
from l2d_framework.errors import CheckpointError, ConfigError
from l2d_framework.model import DiffusionLM
from l2d_framework.registry import registry
from l2d_framework.types import Foreign


def convert(
    source: str, out: str | Path, *, reader: str, base: str | None = None, classes: tuple[str, ...] | None = None
) -> DiffusionLM:
    """Convert a checkpoint and write it.

    Args:
        source: folder or hub id of the foreign checkpoint.
        out: folder to write; it must be empty or missing.
        reader: name of the format, such as "l2d-reference".
        base: folder or hub id of the language model; the weights in the source must equal it. When None, the source's
            own copy is written to `out`/base.
        classes: names of the class labels; class_0, class_1, ... when None.

    Returns:
        The converted model.

    Raises:
        ConfigError: if `out` is not empty or the classes do not fit.
        CheckpointError: if weights are missing or differ from `base`.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{str(out)!r} is not empty. Give a new folder, so that nothing is overwritten.")
    foreign = registry().converter(reader)(fetch(source))
    own_copy = (out / "base").resolve()
    run = _run(foreign, base or str(own_copy), classes)
    if base is None:
        _write_base(foreign, own_copy)
    model = build_model(run)
    _compare(model, foreign)
    targets = model.own_parameters()
    wanted, found = ({(name, *value.shape) for name, value in part.items()} for part in (targets, foreign.own))
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    if missing or unknown:
        raise CheckpointError(
            f"{source!r} does not fit its own settings: missing {missing[:3]}, unknown {unknown[:3]}."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(foreign.own[name])
    save(model, out)
    return model


def _run(foreign: Foreign, base: str, classes: tuple[str, ...] | None) -> DiffusionRun:
    count = foreign.parts["backbone"].get("num_classes", 0)
    names = [f"class_{i}" for i in range(count)] if classes is None else list(classes)
    if len(names) != count:
        raise ConfigError(f"The checkpoint has {count} classes; {len(names)} names were given: {names}.")
    data: dict[str, Any] = {"model": {"base": base}, "classes": names, **foreign.parts}
    run = parse_run(data)
    assert isinstance(run, DiffusionRun)
    return run


def _write_base(foreign: Foreign, folder: Path) -> None:
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**foreign.base_config))
    dtype = next(iter(foreign.base.values())).dtype
    lm = lm.to(dtype)
    result = lm.load_state_dict(foreign.base, strict=False)
    tied = set(getattr(lm, "_tied_weights_keys", None) or {}) if lm.config.tie_word_embeddings else set()
    lost = [name for name in result.missing_keys if name not in tied]
    if lost or result.unexpected_keys:
        raise CheckpointError(
            f"The language model inside the checkpoint is incomplete: missing {lost[:3]}, "
            f"unexpected {list(result.unexpected_keys)[:3]}. Name the original model as `base`."
        )
    lm.save_pretrained(folder)


def _compare(model: DiffusionLM, foreign: Foreign) -> None:
    state: dict[str, Tensor] = model.backbone.lm.state_dict()
    for name, value in foreign.base.items():
        if name in state and not torch.equal(state[name].to(value.dtype), value):
            raise CheckpointError(
                f"{name!r} in the checkpoint differs from the base model's, so the diffusion path was trained over "
                "another model. Leave `base` out to use the checkpoint's own copy."
            )
