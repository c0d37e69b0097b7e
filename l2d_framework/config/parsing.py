"""From run files to runs and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from l2d_framework.component import Component, merged
from l2d_framework.config.files import override, read_file
from l2d_framework.config.reward import RewardRun, reward_type, with_reward_preset
from l2d_framework.config.runs import DiffusionRun, LanguageModelRun, Run, diffusion_type
from l2d_framework.config.sampling import complete, is_complete, with_preset
from l2d_framework.config.validation import refuse_unknown, validated
from l2d_framework.errors import ConfigError, L2DError, PluginError, shown, suggest
from l2d_framework.registry import declared, registry

T = TypeVar("T")

_KINDS: dict[str, type[Run]] = {"diffusion": DiffusionRun, "language_model": LanguageModelRun, "reward": RewardRun}


def load_run(path: str | Path, overrides: list[str] | None = None) -> list[Run]:
    """Runs of a file, in order, values replaced, checked as far as possible without reading models or data."""
    data = override(read_file(path), overrides or [])
    try:
        return parse_stages(data)
    except L2DError as error:
        raise ConfigError(f"{path} cannot be used:\n{error}") from error


def parse_stages(data: Mapping[str, Any]) -> list[Run]:
    """Runs of a file's contents: the fields of one, or `stages` with a list."""
    if "stages" not in data:
        return [parse_run(data)]
    stages = data["stages"]
    if len(data) > 1:
        others = ", ".join(sorted(set(data) - {"stages"}))
        raise ConfigError(f"stages: must stand alone, got also {others}; move it into the stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, Mapping) for stage in stages):
        raise ConfigError(
            f"stages: should be a list of runs, got {shown(stages)}; write one `- kind: ...` section for each"
        )
    _each(_refuse_early, stages)
    return _each(parse_run, stages)


def _each(do: Callable[[Mapping[str, Any], str], T], stages: Sequence[Mapping[str, Any]]) -> list[T]:
    out, problems = [], []
    for index, stage in enumerate(stages):
        try:
            out.append(do(stage, f"stages.{index}"))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return out


def parse_run(data: Mapping[str, Any], where: str = "") -> Run:
    """One run from its fields, complete; `method` fills in what is left out; `where`: its path, for messages."""
    _refuse_early(data, where)
    kind = _kind(data, where)
    if kind is LanguageModelRun:
        return validated(LanguageModelRun, data, where)
    if kind is RewardRun:
        return validated(reward_type(registry()), with_reward_preset(data), where)
    prefix = f"{where}." if where else ""
    method, data = _without_method(data)
    if method is not None:
        try:
            data, method = _laid_over(registry().method(str(method)), data, str(method))
        except PluginError as error:
            raise ConfigError(f"{prefix}method: {error}") from error
    try:
        data = _completed(data, method)
    except PluginError as error:
        raise ConfigError(f"{prefix}sampling.preset: {error}") from error
    run = validated(diffusion_type(registry()), data, where)
    try:
        return run.model_copy(update={"sampling": complete(run.sampling, run.parametrization)})
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _kind(data: Mapping[str, Any], where: str) -> type[Run]:
    kind = data.get("kind", "diffusion")
    if not isinstance(kind, str) or kind not in _KINDS:
        place = f"{where}.kind" if where else "kind"
        raise ConfigError(
            f"{place}: should be one of {', '.join(_KINDS)}, got {shown(kind)}{suggest(str(kind)[:80], _KINDS)}"
        )
    return _KINDS[kind]


def _without_method(data: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    return data.get("method"), {name: value for name, value in data.items() if name != "method"}


def _refuse_early(data: Mapping[str, Any], where: str) -> None:
    """Refuse names nobody declares and what no plugin can make right, before plugins take seconds to load."""
    names = declared()
    if not names.knows_all:  # only with all plugins loaded can all that is wrong be told at once
        return
    kind = _kind(data, where)
    if kind is LanguageModelRun:
        return refuse_unknown(LanguageModelRun, data, where, names)
    if kind is RewardRun:
        return refuse_unknown(reward_type(None), data, where, names)
    prefix = f"{where}." if where else ""
    method, data = _without_method(data)
    sampling = data.get("sampling")
    asked = [("method", method)]
    # A preset is not read where nothing is left to it but, perhaps, an estimate that the parametrization holds.
    if isinstance(sampling, Mapping) and not is_complete({"estimate": {}, **sampling}):
        asked.append(("sampling.preset", sampling.get("preset")))
    for place, name in asked:
        if name is not None and (isinstance(name, str) or place == "method"):
            try:
                names.check_name(place.rpartition(".")[2], str(name))
            except PluginError as error:
                raise ConfigError(f"{prefix}{place}: {error}") from error
    return refuse_unknown(diffusion_type(None), data, where, names)


def resolved_json(run: Run) -> str:
    """A run with nothing left out."""
    return json.dumps(run.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def config_hash(run: Run) -> str:
    """SHA-256 of a run's canonical JSON (sorted keys, no spaces), in hexadecimal."""
    canonical = json.dumps(run.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


_SETTINGS = ("block_size", "sampling", "data")


def _laid_over(method: Mapping[str, Any], data: Mapping[str, Any], name: str) -> tuple[dict[str, Any], str | None]:
    """A run laid over the fields of its method, and whose settings complete it.

    That is another method where the run chooses another state space, since settings of the first would not fit.
    """
    fields = {field: value for field, value in method.items() if field not in (*_SETTINGS, "description")}
    run = merged(fields, data)
    space, chosen = (section.get("parametrization") for section in (fields, run))
    is_same = not isinstance(chosen, Mapping) or space is None or chosen.get("name") == space.get("name")
    return run, name if is_same else None


def _completed(data: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """Fill in what a run file may leave out; whatever is malformed stays as it is for validation to name."""
    out = dict(data)
    state, chosen = _component(data, "parametrization")
    method = method or getattr(state, "default_method", None)
    defaults = registry().methods().get(method or "", {})
    sampling = {} if data.get("sampling") is None else data["sampling"]
    if isinstance(sampling, Mapping):
        # An estimate written in the parametrization is as explicit as one in sampling: it wins over the preset.
        explicit = merged({"estimate": chosen["estimate"]}, sampling) if chosen.get("estimate") else sampling
        out["sampling"] = with_preset(explicit, method)
    out.setdefault("block_size", defaults.get("block_size", 1))
    section = data.get("data")
    if isinstance(section, Mapping):
        given = {name: value for name, value in section.items() if name != "padding" or value is not None}
        out["data"] = merged({"padding": "none", **defaults.get("data", {})}, given)
    network, chosen = _component(data, "backbone")
    classes = data.get("classes")
    has_count = network is not None and "num_classes" in network.model_fields
    if classes and isinstance(classes, list) and has_count and chosen.get("num_classes") is None:
        out["backbone"] = {**chosen, "num_classes": len(classes)}
    return out


def _component(data: Mapping[str, Any], kind: str) -> tuple[type[Component] | None, Mapping[str, Any]]:
    chosen = data.get(kind)
    if not isinstance(chosen, Mapping) or not isinstance(chosen.get("name"), str):
        return None, {}
    return registry().components(kind).get(chosen["name"]), chosen
