"""The manifest of a checkpoint: everything it says besides weights, and where its language model lies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from l2d_framework.base_model import LANGUAGE_MODEL
from l2d_framework.config import ModelSection
from l2d_framework.config.validation import validated
from l2d_framework.errors import CheckpointError

MANIFEST = "l2d.json"
FORMAT = 1
_FIELDS = {
    "model",
    "fingerprint",
    "schedule",
    "parametrization",
    "backbone",
    "block_size",
    "classes",
    "sampling",
    "chat_template",
}


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Args:
        path: the file.

    Returns:
        Hexadecimal digest.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Manifest of a checkpoint whose weight files are complete.

    Args:
        folder: the checkpoint.

    Returns:
        The manifest.

    Raises:
        CheckpointError: if the folder is no checkpoint, a file is damaged, or the format is newer than this package.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no {MANIFEST}, so it is no l2d-framework checkpoint. Give the output_dir of a run, "
            "or use `l2d convert` for the authors' checkpoints."
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, files = int(manifest["format"]), dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error!r}). Restore it or save the model again.") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{str(folder)!r} has checkpoint format {version}; this version of l2d-framework reads up to {FORMAT}. "
            "Upgrade l2d-framework."
        )
    if lacking := sorted(_FIELDS - manifest.keys()):
        raise CheckpointError(f"{str(path)!r} is damaged (it lacks {lacking}). Restore it or save the model again.")
    for name, digest in files.items():
        if not (folder / name).is_file() or file_hash(folder / name) != digest:
            raise CheckpointError(
                f"{str(folder / name)!r} is missing, truncated or changed since it was saved. "
                "Copy the checkpoint again, or resume from an earlier one."
            )
    return manifest


def base_reference(
    folder: str | Path, manifest: dict[str, Any], *, base: str | None = None, dtype: str | None = None
) -> ModelSection:
    """Where the language model of a checkpoint lies: inside it, or where its manifest says.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        base: where the base model lies now; as recorded when None.
        dtype: of the weights; as recorded when None.

    Returns:
        The section.

    Raises:
        CheckpointError: if neither names a base model, or a base is named for a checkpoint that needs none.
    """
    recorded = manifest["model"]
    inside = Path(folder) / LANGUAGE_MODEL
    if inside.is_dir():
        if base is not None:
            raise CheckpointError(f"{str(folder)!r} holds its own language model, got base={base!r}. Leave base out.")
        fields = {"base": str(inside), "attn_implementation": (recorded or {}).get("attn_implementation", "sdpa")}
        return validated(ModelSection, fields | ({} if dtype is None else {"dtype": dtype}), "model")
    if recorded is None and base is None:
        raise CheckpointError("This checkpoint names no base model. Pass its folder or hub id as `base`.")
    changes: dict[str, Any] = {"base": base, "revision": None, "adapter": None} if base is not None else {}
    if dtype is not None:
        changes["dtype"] = dtype
    return validated(ModelSection, {**(recorded or {}), **changes}, "model")
