"""The manifest of a checkpoint: everything it says besides weights, and where its language model lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from l2d_framework.base_model import LANGUAGE_MODEL, is_adapter
from l2d_framework.config import ModelSection, parse_sampling
from l2d_framework.config.files import parse_json, read_text
from l2d_framework.config.sections import Section
from l2d_framework.config.validation import validated
from l2d_framework.errors import CheckpointError, MissingModelError
from l2d_framework.models.labels import MANIFEST
from l2d_framework.models.origin import Origin
from l2d_framework.opening import TRAINED_IN, found_from, looked_in

WEIGHTS = "diffusion.safetensors"
CARD = "README.md"
FORMAT = 2
"""Format 1 hashes weights; format 2 every file but the model card, which may be edited, and the manifest itself."""
_OPENED = (
    *("*config.json", "*token*.json", "*.index.json", "*template*.json", "*.jinja", "*/*.jinja"),
    *("*.safetensors", "*.bin", "*.model", "vocab.*", "merges.txt"),
)
"""Files that transformers opens in a folder with a language model."""
_PATHS = ("base", "adapter")


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"should be a path inside the checkpoint, got {name!r}")
    return name


def _with_weights(files: dict[str, str]) -> dict[str, str]:
    if WEIGHTS not in files:
        raise ValueError(f"should name {WEIGHTS}")
    return files


class Manifest(Section):
    """The fields of `l2d.json`; those added after format 2 have a default."""

    format: int = Field(ge=1)
    l2d_framework: str = ""
    """Version of the package that saved it."""
    model: ModelSection | None
    fingerprint: str | None
    schedule: dict[str, Any]
    parametrization: dict[str, Any]
    backbone: dict[str, Any]
    block_size: int | None = Field(ge=1)
    classes: list[str]
    sampling: dict[str, Any] | None
    chat_template: str | None
    ends: list[int] | None = None
    """Tokens that end an answer, as training taught; not recorded by format 1."""
    trained_in: str | None = None
    """Folder from which relative paths of `model` lead; None where there are none."""
    files: Annotated[dict[Annotated[str, AfterValidator(_inside)], str], AfterValidator(_with_weights)]
    """SHA-256 of every file that belongs to the checkpoint, by its path inside it."""
    seal: str | None = None
    """SHA-256 of the other fields; from format 2 on."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    stat = path.stat()
    # Commands read a manifest before they load its model; gigabytes are read once.
    return _file_hash(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=1024)
def _file_hash(path: Path, *stamps: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a manifest with the hash that shows whether they were changed."""
    others = {name: value for name, value in fields.items() if name != "seal"}
    return others | {"seal": hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()}


def opened_files(folder: Path) -> set[str]:
    """Files that are opened where a checkpoint holds its own language model."""
    paths = (path for pattern in _OPENED for path in (folder / LANGUAGE_MODEL).glob(pattern))
    return {path.relative_to(folder).as_posix() for path in paths if not path.name.startswith(".")}


def holds_language_model(manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has its language model inside."""
    return any(PurePosixPath(name).parts[0] == LANGUAGE_MODEL for name in manifest["files"])


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Manifest of a checkpoint that is complete and as it was saved; fields that it lacks are at their defaults."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no {MANIFEST}, so it is no l2d-framework checkpoint. Give the output_dir of a run, "
            "or use `l2d convert` for the authors' checkpoints."
        )
    text, fields = _fields(path)
    if isinstance(version := fields.get("format"), int) and version > FORMAT:
        raise CheckpointError(
            f"{str(folder)!r} has checkpoint format {version}; this version of l2d-framework reads up to {FORMAT}. "
            "Upgrade l2d-framework."
        )
    try:
        manifest = Manifest.model_validate_json(text).model_dump(mode="json")
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise CheckpointError(
            f"{str(path)!r} is damaged ({wrong[:300]}). Restore it or save the model again, or upgrade l2d-framework "
            "if a newer one saved it."
        ) from error
    if manifest["format"] > 1:
        if sealed(fields) != fields:
            raise CheckpointError(
                f"{str(path)!r} was changed since it was saved. Restore it. Where the base model lies now is given as "
                "`base`, other settings of sampling when generating."
            )
        for name in sorted(opened_files(folder) - manifest["files"].keys() if holds_language_model(manifest) else ()):
            raise CheckpointError(
                f"{str(folder / name)!r} is no part of the checkpoint, but would be opened with it. Move it elsewhere."
            )
    for name, digest in manifest["files"].items():
        if not _is_as_saved(folder / name, digest):
            raise CheckpointError(
                f"{str(folder / name)!r} is missing, truncated or changed since it was saved. "
                "Copy the checkpoint again, or resume from an earlier one."
            )
    return manifest


def _fields(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = read_text(path)
        fields = parse_json(text, path.name)
        if not isinstance(fields, dict):
            raise ValueError(f"holds {type(fields).__name__} instead of fields")
        return text, fields
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged ({str(error)[:300]}). Restore it or save the model again."
        ) from error


def _is_as_saved(path: Path, digest: str) -> bool:
    # Perhaps a link, as in the cache of the hub: its content is what counts.
    try:
        return path.is_file() and file_hash(path) == digest
    except OSError:
        return False


def base_reference(
    folder: str | Path, manifest: dict[str, Any], *, base: str | None = None, dtype: str | None = None
) -> ModelSection:
    """Where the language model of a checkpoint lies: inside it, or where `base` or else its manifest says."""
    recorded: dict[str, Any] = manifest["model"] or {}
    paths = {name: found_from(recorded[name], _places(folder, manifest)) for name in _PATHS if recorded.get(name)}
    fields = recorded | paths
    if holds_language_model(manifest):
        if base is not None:
            raise CheckpointError(f"{str(folder)!r} holds its own language model, got base={base!r}. Leave base out.")
        attention = fields.get("attn_implementation", "sdpa")
        fields = {"base": str(Path(folder) / LANGUAGE_MODEL), "attn_implementation": attention}
    elif base is not None:
        fields = fields | {"base": base, "revision": None}
        if is_adapter(Path(base)):  # the one that was merged, where it lies now
            fields |= {"adapter": None}
    elif not fields:
        raise CheckpointError("This checkpoint names no base model. Pass its folder or hub id as `base`.")
    return validated(ModelSection, fields if dtype is None else fields | {"dtype": dtype}, "model")


def _places(folder: str | Path, manifest: Mapping[str, Any]) -> list[Any]:
    """Folders from which relative paths in a manifest may lead, beside the one from which it is read."""
    return [manifest.get(TRAINED_IN), folder]


@contextmanager
def opening_base(folder: str | Path, base: str | None, manifest: Mapping[str, Any]) -> Iterator[None]:
    """Say of a language model that is not where a checkpoint tells, unless by `base`, how to name where it lies now."""
    try:
        yield
    except MissingModelError as error:
        if base is not None:
            raise
        recorded = manifest.get("model") or {}
        paths = filter(None, (recorded.get(name) for name in _PATHS))
        looked = "".join({looked_in(path, _places(folder, manifest)) for path in paths})
        raise MissingModelError(
            f"{error}{looked} {str(folder)!r} was trained over it. Name where it lies now: `base` of `l2d.load` and of "
            "lm_eval's --model_args, --base of other commands."
        ) from error


def recorded_origin(manifest: Mapping[str, Any], model: ModelSection | None, fingerprint: str | None) -> Origin:
    """What a manifest says its model was made from."""
    return Origin(
        model=model,
        fingerprint=fingerprint,
        classes=tuple(manifest["classes"]),
        sampling=manifest["sampling"] and parse_sampling(manifest["sampling"]),
        chat_template=manifest["chat_template"],
        ends=None if manifest["ends"] is None else tuple(manifest["ends"]),
    )
