"""The language model under a diffusion model: where it lies, that it is the right one, and loading it."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.import_utils import is_gguf_available

from l2d_framework.errors import CheckpointError, ConfigError, MissingModelError, install
from l2d_framework.opening import (
    adapter_base,
    adapter_places,
    check_published,
    looked_in,
    new_model,
    open_adapter,
    open_config,
    open_model,
    open_tokenizer,
    reading,
)

LANGUAGE_MODEL = "language_model"
"""Folder inside a diffusion checkpoint whose backbone trains the language model itself."""

_READS_GGUF = (5, 18)
"""First release of transformers that reads the control tokens of GGUF files."""

_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
_SAMPLED_ROWS = 16
_SAMPLED_ENTRIES = 4096


class BaseReference(Protocol):
    """Which language model; the `model` section of a run file is one."""

    base: str
    revision: str | None
    adapter: str | None
    gguf_file: str | None
    pad_token: str | None

    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def attn_implementation(self) -> str: ...  # noqa: D102


def fetch(path: str, revision: str | None = None, *, gguf_file: str | None = None, weights: bool = True) -> Path:
    """Local folder of a model: the folder itself, or a snapshot of the hub repository, if need be without weights."""
    if Path(path).is_dir():
        check_published(path)
        return Path(path)
    if Path(path).suffix == ".gguf" and Path(path).is_file():
        raise ConfigError(
            f"{path!r} is a file. Set model.base to its folder and model.gguf_file to {Path(path).name!r}."
        )
    if Path(path).is_file():
        raise ConfigError(f"{path!r} is a file. Give a folder with a model; that of a run file is its output_dir.")
    if Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise MissingModelError(
            f"There is no folder {path!r}. Give the path of a model folder, or a hub id such as org/name."
        )
    wanted = "*.safetensors" if gguf_file is None else gguf_file
    try:
        if not weights:
            return Path(snapshot_download(path, revision=revision, allow_patterns=[*_FILES]))
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=[wanted, *_FILES]))
        if gguf_file is None and not list(folder.glob(wanted)):
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=[*_FILES, "*.bin"]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise MissingModelError(
            f"{path!r} is neither a folder here nor a hub repository that can be reached ({type(error).__name__}). "
            "Check the spelling, or download it first and give the folder."
        ) from error


def locate(reference: BaseReference, *, weights: bool = True) -> tuple[Path, Path | None]:
    """Folders of the base, perhaps without its weights, and of the PEFT adapter merged into it, or None."""
    gguf_file = reference.gguf_file
    # A GGUF file holds the config beside the weights, and an adapter's weights say how large the vocabulary is.
    weights = weights or gguf_file is not None
    folder = fetch(reference.base, reference.revision, gguf_file=gguf_file, weights=weights)
    adapter = None if reference.adapter is None else fetch(reference.adapter)
    if is_adapter(folder):
        if adapter is not None:
            raise ConfigError(
                f"model.base {reference.base!r} is itself a PEFT adapter, so model.adapter {reference.adapter!r} would "
                "be a second one. Merge one of them first."
            )
        adapter = fetch(reference.base, reference.revision)
        try:
            folder = fetch(base := adapter_base(folder), gguf_file=gguf_file, weights=weights)
        except MissingModelError as error:
            looked = looked_in(base, adapter_places(adapter))
            raise ConfigError(
                f"{error}{looked} The PEFT adapter {str(adapter)!r} was trained on it: write where it lies now into "
                "its adapter_config.json, as base_model_name_or_path."
            ) from error
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ConfigError(f"model.gguf_file: {str(folder)!r} has no file {gguf_file!r}. {gguf_hint(folder)}")
        if tuple(map(int, transformers.__version__.split(".")[:2])) < _READS_GGUF:
            raise ConfigError(
                f"model.gguf_file: transformers {transformers.__version__} loses the control tokens of GGUF files. "
                'Run: pip install "transformers>=5.18"'
            )
        if not is_gguf_available():
            raise ConfigError(
                f"model.gguf_file: {gguf_file!r} is read with the package gguf, which is missing or too old. "
                f"Run: {install('l2d-framework[gguf]')}, or: pip install gguf"
            )
        return folder, adapter
    if not (folder / "config.json").is_file() and (folder / LANGUAGE_MODEL / "config.json").is_file():
        folder = folder / LANGUAGE_MODEL
    if not (folder / "config.json").is_file():
        raise MissingModelError(
            f"{str(folder)!r} holds no config.json, so it is no transformers model. "
            f"{gguf_hint(folder) or 'Check model.base.'}"
        )
    return folder, adapter


def trained_in(reference: BaseReference | None) -> str | None:
    """This folder, if paths to a language model lead from here; None where they are whole or names on the hub."""
    paths = [] if reference is None else filter(None, (reference.base, reference.adapter))
    return str(Path.cwd()) if any(not Path(path).is_absolute() and Path(path).is_dir() for path in paths) else None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter without a language model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def gguf_hint(folder: Path) -> str:
    """What to set where a folder without a model of another format has GGUF files."""
    names = sorted(path.name for path in folder.glob("*.gguf"))
    return f"Set model.gguf_file to one of {names}." if names else ""


def load_config(reference: BaseReference) -> PreTrainedConfig:
    """Config of the base model, without weights."""
    config: Any = _opened(open_config, locate(reference, weights=False)[0], reference.gguf_file)
    check_quantization(config, reference.base)
    if hasattr(config, "vocab_size"):  # else no language model, which a backbone refuses
        with reading(f"the config.json of {reference.base!r}"):
            config.vocab_size = _vocabulary(reference, config)
    return config  # type: ignore[no-any-return]


def _opened(opener: Any, folder: Path, gguf_file: str | None) -> Any:
    """Config or tokenizer in a folder, or in a GGUF file, which is parsed once: a vocabulary takes seconds."""
    if gguf_file is None:
        return opener(folder)
    return copy.deepcopy(_parsed(opener, folder / gguf_file, (folder / gguf_file).stat().st_mtime_ns))


@lru_cache(maxsize=4)
def _parsed(opener: Any, path: Path, changed: int) -> Any:
    return opener(path.parent, gguf_file=path.name)


def check_quantization(config: PreTrainedConfig, base: str, *, whole: bool | None = None) -> None:
    """Refuse quantized weights that cannot be read here, or not be trained as asked."""
    # `whole`: its own weights are to be trained; False: gradients only pass through them; None: neither.
    section = getattr(config, "quantization_config", None)
    if section is None:
        return
    method = section.get("quant_method") if isinstance(section, dict) else getattr(section, "quant_method", section)
    if whole:
        raise ConfigError(
            f"model.base: {base!r} is quantized with {str(method)!r}, and quantized weights cannot be trained. Train a "
            "LoRA or a frozen model's diffusion path over it, or start from the model before quantization."
        )
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(section), pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except (RuntimeError, NotImplementedError):
        return  # What the machine lacks is said when weights load: a run may be checked on another one.
    # Every method has checks of its own over what a file may hold.
    except Exception as error:
        hint = "" if "pip install" in str(error) else f" Run: pip install {method}"
        raise ConfigError(
            f"model.base: {base!r} is quantized with {str(method)!r}, which cannot be read here: {error}"
            f"{hint if isinstance(error, ImportError) else ''}"
        ) from error
    if whole is False and not quantizer.is_trainable:
        raise ConfigError(
            f"model.base: {base!r} is quantized with {str(method)!r} in a way through which no gradient passes. Start "
            "from the model before quantization, or quantize it to 8-bit weights or with bitsandbytes."
        )


def load_language_model(reference: BaseReference) -> PreTrainedModel:
    """The base model with its weights, a PEFT adapter merged in, in evaluation mode."""
    folder, adapter = locate(reference)
    options: dict[str, Any] = {}
    if reference.gguf_file is not None:
        options = {"gguf_file": reference.gguf_file, "config": _opened(open_config, folder, reference.gguf_file)}
        # transformers before 5.23 knows no other way than to unpack.
        if (packed := getattr(transformers, "GgufConfig", None)) is not None:
            options["quantization_config"] = packed(dequantize=True)
    options |= {"dtype": reference.dtype, "attn_implementation": reference.attn_implementation}
    lm: Any
    lm, report = open_model(AutoModelForCausalLM, folder, **options)
    if report["missing_keys"]:
        raise CheckpointError(
            f"{reference.base!r} lacks the weights {sorted(report['missing_keys'])[:3]}, which would be random. It may "
            "hold a reward model, or a file saved without them; name a folder with the whole language model."
        )
    if reference.gguf_file is not None and lm.config.__dict__.pop("quantization_config", None) is not None:
        # transformers from 5.23 on remembers where the weights came from, and would refuse to save them.
        lm.hf_quantizer, lm.is_quantized = None, False
    if type(lm.get_input_embeddings().weight) is not nn.Parameter:
        raise ConfigError(
            f"{reference.base!r} has a quantized embedding table, which noise must be added to. Quantize the model "
            "without its embeddings."
        )
    if adapter is not None:
        lm = _merged(lm, reference, adapter)
    _resize(lm, _vocabulary(reference, lm.config))
    return lm.eval()  # type: ignore[no-any-return]


def _merged(lm: Any, reference: BaseReference, adapter: Path) -> Any:
    _resize(lm, _adapted_rows(adapter, lm.config))
    try:
        with warnings.catch_warnings(), reading("it", adapter):
            # That an adapter may untie the embeddings: this model is not saved under its old config.
            warnings.simplefilter("ignore", UserWarning)
            merged = open_adapter(lm, adapter).merge_and_unload()
    except CheckpointError as error:
        raise CheckpointError(
            f"The PEFT adapter {str(adapter)!r} cannot be merged into {reference.base!r}: {error} "
            "Check that it was trained on this model, or merge it yourself and name the result as model.base."
        ) from error
    if merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        merged.config.tie_word_embeddings = False
    return merged


def _resize(lm: Any, rows: int) -> None:
    if rows != lm.config.vocab_size:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            lm.resize_token_embeddings(rows, mean_resizing=False)


def empty_language_model(
    config: PreTrainedConfig, attn_implementation: str, *, dtype: str = "auto", kind: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """The base model's shapes on the meta device, in the config's type when `dtype` is `auto`."""
    options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    with torch.device("meta"):
        lm: Any = new_model(kind, config, attn_implementation=attn_implementation, **options)
        return lm.eval()  # type: ignore[no-any-return]


def load_tokenizer(reference: BaseReference) -> PreTrainedTokenizerBase | None:
    """Tokenizer of the base model, None if it has none, with the reference's pad token if it lacks one of its own."""
    base, adapter = locate(reference, weights=False)
    for folder in filter(None, (adapter, base)):
        has_files = (folder / "tokenizer_config.json").is_file()
        if has_files or (folder == base and reference.gguf_file is not None):
            tokenizer: PreTrainedTokenizerBase = _opened(
                open_tokenizer, folder, None if has_files else reference.gguf_file
            )
            if reference.pad_token is not None and tokenizer.pad_token is None:
                tokenizer.add_special_tokens({"pad_token": reference.pad_token})
            return tokenizer
    return None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, base: str) -> None:
    """Refuse a tokenizer that makes tokens the model has no embedding for."""
    # Tokens that stand for pictures and sounds are not looked up in the table and may lie outside. So may the token for
    # unknown text, which transformers gives to vocabularies of bytes, too, that know all text.
    size, known = getattr(config, "vocab_size", math.inf), tokenizer.get_vocab()
    unused = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "video", "audio", "unk")}
    beyond = [token for token, number in known.items() if number >= size and token not in unused]
    if beyond:
        token = min(beyond, key=known.__getitem__)
        raise ConfigError(
            f"model.base: the tokenizer of {base!r} has token {token!r} with number {known[token]}, in all "
            f"{max(known.values()) + 1} tokens, but the model's embedding table has only {size} rows. Resize the model "
            "(resize_token_embeddings) and save it again, or save the tokenizer it was trained with beside it."
        )


def _adapted_rows(adapter: Path, config: PreTrainedConfig) -> int:
    """Rows of the embedding table an adapter was trained with: those of its own copy, or one for every token."""
    copies = {name: shape[0] for name, shape, _, _ in _samples(adapter) if len(shape) == 2 and ".lora_" not in name}
    if copies:
        empty = empty_language_model(config, "eager")
        ends = (empty.get_input_embeddings(), empty.get_output_embeddings())
        tables = tuple(f"base_model.model.{name}." for name, module in empty.named_modules() if module in ends)
        for name, rows in copies.items():
            if name.startswith(tables) and name.endswith(".weight"):
                return rows
    if not (adapter / "tokenizer_config.json").is_file():
        return int(config.vocab_size)
    return max(int(config.vocab_size), len(open_tokenizer(adapter)))


def _vocabulary(reference: BaseReference, config: PreTrainedConfig) -> int:
    """Rows of the embedding table once the adapter's tokens and the reference's pad token have been added."""
    _, adapter = locate(reference, weights=False)
    size = config.vocab_size if adapter is None else _adapted_rows(adapter, config)
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
    """Hash that tells one set of base weights from another, read from the files without loading them."""
    # Name, shape, type and up to 16 evenly spaced rows of every tensor: enough to tell a finetuned copy, which changes
    # whole matrices, but not an edit of single rows.
    digest = hashlib.sha256()
    base, adapter = locate(reference)
    for folder in filter(None, (base, adapter)):
        if folder == base and reference.gguf_file is not None:
            _digest_file(digest, folder / reference.gguf_file)
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


def _digest_file(digest: Any, path: Path) -> None:
    """Length, beginning and evenly spaced pieces of a file, in whatever way it packs its weights."""
    size = path.stat().st_size
    digest.update(f"{size}\n".encode())
    with path.open("rb") as file:
        for number in range(_SAMPLED_ENTRIES):
            file.seek(number * max(size - _SAMPLED_ENTRIES, 0) // (_SAMPLED_ENTRIES - 1))
            digest.update(file.read(_SAMPLED_ENTRIES))


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
