"""The language model under a diffusion model: where it lies, that it is the right one, and loading it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from l2d_framework.errors import CheckpointError, ConfigError
from l2d_framework.opening import (
    adapter_base,
    new_model,
    open_adapter,
    open_config,
    open_model,
    open_tokenizer,
    reading,
)

LANGUAGE_MODEL = "language_model"
"""Folder inside a diffusion checkpoint whose backbone trains the language model itself."""

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_SAMPLED_ROWS = 16
_SAMPLED_ENTRIES = 4096


class BaseReference(Protocol):
    """Which language model; the `model` section of a run file is one."""

    @property
    def base(self) -> str: ...  # noqa: D102
    @property
    def revision(self) -> str | None: ...  # noqa: D102
    @property
    def adapter(self) -> str | None: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def attn_implementation(self) -> str: ...  # noqa: D102
    @property
    def pad_token(self) -> str | None: ...  # noqa: D102


def fetch(path: str, revision: str | None = None) -> Path:
    """Local folder of a model: the folder itself, or a snapshot of the hub repository.

    Args:
        path: folder or hub id.
        revision: of the hub repository.

    Returns:
        The folder.

    Raises:
        ConfigError: if it is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ConfigError(
            f"There is no folder {path!r}. Give the path of a model folder, or a hub id such as org/name."
        )
    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=list(_FILES)))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=[*_FILES, "*.bin"]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{path!r} is neither a folder here nor a hub repository that can be reached ({type(error).__name__}). "
            "Check the spelling, or download it first and give the folder."
        ) from error


def locate(reference: BaseReference) -> tuple[Path, Path | None]:
    """Folders of the base weights and of the PEFT adapter merged into them.

    Args:
        reference: a model section; its base may itself be a PEFT folder, or a diffusion checkpoint that holds its own
            language model.

    Returns:
        (base folder, adapter folder or None).

    Raises:
        ConfigError: if a folder is missing or holds no model.
    """
    folder = fetch(reference.base, reference.revision)
    adapter = None if reference.adapter is None else fetch(reference.adapter)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        if adapter is not None:
            raise ConfigError(
                f"model.base {reference.base!r} is itself a PEFT adapter, so model.adapter {reference.adapter!r} would "
                "be a second one. Merge one of them first."
            )
        folder, adapter = fetch(adapter_base(folder)), folder
    if not (folder / "config.json").is_file() and (folder / LANGUAGE_MODEL / "config.json").is_file():
        folder = folder / LANGUAGE_MODEL
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{str(folder)!r} holds no config.json, so it is no transformers model. Check model.base.")
    return folder, adapter


def load_config(reference: BaseReference) -> PreTrainedConfig:
    """Config of the base model, without weights.

    Args:
        reference: a model section.

    Returns:
        The transformers config.

    Raises:
        CheckpointError: if transformers cannot read it.
    """
    folder, _ = locate(reference)
    config: Any = open_config(folder)
    with reading(f"the config.json of {reference.base!r}"):
        config.vocab_size = _vocabulary(reference, config.vocab_size)
        return config  # type: ignore[no-any-return]


def load_language_model(reference: BaseReference) -> PreTrainedModel:
    """The base model with its weights, a PEFT adapter merged in.

    Args:
        reference: a model section.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: if transformers cannot load it as asked, or weights are missing.
    """
    folder, adapter = locate(reference)
    lm: Any
    lm, report = open_model(
        AutoModelForCausalLM, folder, dtype=reference.dtype, attn_implementation=reference.attn_implementation
    )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{reference.base!r} lacks the weights {sorted(report['missing_keys'])[:3]}, which would be random. It may "
            "hold a reward model, or a file saved without them; name a folder with the whole language model."
        )
    if adapter is not None:
        lm = open_adapter(lm, adapter).merge_and_unload()
    size = _vocabulary(reference, lm.config.vocab_size)
    if size > lm.config.vocab_size:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            lm.resize_token_embeddings(size, mean_resizing=False)
    return lm.eval()  # type: ignore[no-any-return]


def empty_language_model(config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    """The base model's shapes on the meta device.

    Args:
        config: transformers config.
        attn_implementation: attention kernel.

    Returns:
        A model without storage.
    """
    with torch.device("meta"):
        return new_model(  # type: ignore[no-any-return]
            AutoModelForCausalLM, config, attn_implementation=attn_implementation
        ).eval()


def load_tokenizer(reference: BaseReference) -> PreTrainedTokenizerBase | None:
    """Tokenizer of the base model, with the reference's pad token if it has none of its own.

    Args:
        reference: a model section.

    Returns:
        The tokenizer, or None when the base folder has none.
    """
    base, adapter = locate(reference)
    for folder in (adapter, base):
        if folder is not None and (folder / "tokenizer_config.json").is_file():
            tokenizer = open_tokenizer(folder)
            if reference.pad_token is not None and tokenizer.pad_token is None:
                tokenizer.add_special_tokens({"pad_token": reference.pad_token})
            return tokenizer
    return None


def _vocabulary(reference: BaseReference, size: int) -> int:
    """Rows of the embedding table once the reference's pad token has been added.

    Raises:
        ConfigError: if there is no tokenizer to add it to.
    """
    if reference.pad_token is None:
        return size
    tokenizer = load_tokenizer(reference)
    if tokenizer is None:
        raise ConfigError(
            f"model.pad_token is {reference.pad_token!r}, but {reference.base!r} has no tokenizer to add it to. "
            "Leave it out."
        )
    return max(size, len(tokenizer))


def fingerprint(reference: BaseReference) -> str:
    """Hash that tells one set of base weights from another, read from the files without loading them.

    Covers name, shape, type and up to 16 evenly spaced rows of every tensor: enough to tell a finetuned copy, which
    changes whole matrices, but not an edit of single rows.

    Args:
        reference: a model section.

    Returns:
        Hexadecimal digest.

    Raises:
        CheckpointError: if the folder holds no weights or a file is damaged.
    """
    digest = hashlib.sha256()
    for folder in locate(reference):
        if folder is None:
            continue
        count = 0
        with reading(f"the weights in {str(folder)!r}", folder):
            for name, shape, kind, sample in _samples(folder):
                digest.update(f"{name} {shape} {kind}\n".encode())
                digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
                count += 1
        if not count:
            raise CheckpointError(f"{str(folder)!r} holds no *.safetensors or *.bin weights. Check model.base.")
    return digest.hexdigest()


def _samples(folder: Path) -> Iterator[tuple[str, list[int], str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            for name in sorted(handle.keys()):
                part = handle.get_slice(name)
                yield name, part.get_shape(), str(part.get_dtype()), _sample(part, part.get_shape())
    if not list(folder.glob("*.safetensors")):
        for file in sorted(folder.glob("*model*.bin")):
            # PyTorch's own message does not say which file.
            with reading(repr(str(file))):
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                for name in sorted(state):
                    yield name, list(state[name].shape), str(state[name].dtype), _sample(state[name], state[name].shape)


def _sample(values: Any, shape: Any) -> Tensor:
    """Evenly spaced rows of a tensor or lazy slice."""
    if len(shape) == 0 or 0 in shape:
        return torch.as_tensor(values[...]).reshape(-1)
    count = min(shape[0], _SAMPLED_ROWS if len(shape) > 1 else _SAMPLED_ENTRIES)
    rows = sorted({round(i * (shape[0] - 1) / max(count - 1, 1)) for i in range(count)})
    if len(shape) == 1:
        return torch.as_tensor(values[:])[rows]
    return torch.cat([values[row : row + 1].reshape(-1)[:_SAMPLED_ENTRIES] for row in rows])
