"""The one door through which transformers and PEFT read folders: nothing in them is run, and what is wrong is named."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open

from l2d_framework.errors import CheckpointError, L2DError

if TYPE_CHECKING:  # models take seconds to import, and listing plugins needs none
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ATTENTION = (None, "eager", "sdpa")
"""What a config.json may choose; other names may stand for code on the hub."""

_MODELS = ("*config.json", "l2d.json", "*.gguf")
"""Files one of which is in every folder with a model."""

_MAKING = threading.RLock()
"""transformers replaces functions of its own while it makes a model, and two threads would leave them replaced: no
model made later in the process would tie its weights."""

PUBLISHING = ".publishing"
"""Folder in a run's own that holds its new model whole while the files of an old one are replaced."""
TRAINED_IN = "trained_in"
"""Field of `run.json` and of a manifest: the folder from which their relative paths to a language model lead."""


def found_from(path: str, places: Iterable[str | Path | None]) -> str:
    """A path to a model; a relative one that leads to none from here is taken from the first place where it does."""
    here = [Path(path), *(Path(place, path) for place in places if place)]
    there = next(filter(_holds_model, here), here[0])
    return path if there == here[0] else str(there)


def _holds_model(folder: Path) -> bool:
    with suppress(OSError):  # somebody else's, which may not be looked into
        return folder.is_dir() and any(any(folder.glob(name)) for name in _MODELS)
    return False


def looked_in(path: str, places: Iterable[str | Path | None]) -> str:
    """Sentence on where a path was looked for beside here; nothing of one that is no relative one."""
    names = " and ".join(repr(str(place)) for place in places if place)
    return "" if Path(path).is_absolute() or not names else f" It was looked for from here, from {names}."


def check_published(folder: str | Path) -> None:
    """Refuse a folder in which the files of a model are being replaced, or were when a run was killed."""
    folder = Path(folder)
    for whole in (folder / PUBLISHING, folder.parent / PUBLISHING / folder.name):
        if whole.is_dir():
            raise CheckpointError(
                f"{str(folder)!r} is half published: the run that writes its model there is at work, or was killed. "
                f"The command that trains it completes it; meanwhile the new model is whole in {str(whole)!r}."
            )


@contextmanager
def reading(what: str, folder: str | Path | None = None) -> Iterator[None]:
    """Turn what libraries raise over foreign files into one error that names the damaged one in `folder`, or `what`."""
    try:
        yield
    except BaseException as error:
        # The Rust code of tokenizers panics with something that is no Exception.
        is_foreign = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_foreign or isinstance(error, (L2DError, MemoryError, torch.OutOfMemoryError)):
            raise
        raise CheckpointError(_message(what, folder, error)) from error


def _message(what: str, folder: str | Path | None, error: BaseException) -> str:
    subject = what[:1].upper() + what[1:]
    if "trust_remote_code" in str(error):
        return (
            f"{subject} cannot be read without running code that comes with it, which l2d-framework never does. "
            "Choose a model of a kind that transformers itself knows."
        )
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    damaged = None if folder is None else next(filter(_is_damaged, sorted(Path(folder).glob("*"))), None)
    if damaged is not None:
        return f"{str(damaged)!r} is damaged, so {what} cannot be read ({said}). Download or save it again."
    if folder is not None and not Path(folder).exists():
        return f"{subject} cannot be read ({said}). There is no such folder here, and the hub has given nothing."
    return f"{subject} cannot be read ({said}). It may be damaged or of another kind; download or save it again."


def _is_damaged(path: Path) -> bool:
    """Whether a file is not what its name says, as far as that can be told of it alone."""
    if path.suffix not in (".safetensors", ".json", ".jinja"):
        return False
    try:
        if not path.is_file():
            return True
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt"):
                return False
        text = path.read_text(encoding="utf-8")
        return path.suffix == ".json" and not isinstance(json.loads(text), dict)
    except Exception:
        return True


def open_config(source: str | Path, **options: Any) -> PreTrainedConfig:
    """Config of a model."""
    check_published(source)
    with reading(f"the {options.get('gguf_file') or 'config.json'} of {str(source)!r}", source):
        return _safe(transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **options), source)


def make_config(source: str | Path, fields: dict[str, Any]) -> PreTrainedConfig:
    """Config of a model whose fields have been read already."""
    with reading(f"the config of {str(source)!r}"):
        return _safe(transformers.AutoConfig.for_model(**fields), source)


def _safe(config: PreTrainedConfig, source: str | Path) -> PreTrainedConfig:
    for part in filter(None, (config, *(getattr(config, name, None) for name in config.sub_configs))):
        wanted = part._attn_implementation
        if wanted in _ATTENTION:
            continue
        if "/" in str(wanted):
            raise CheckpointError(
                f"The config of {str(source)!r} asks for the attention kernel {wanted!r} of the hub, and "
                "l2d-framework runs no code that a model brings along. Delete _attn_implementation from it."
            )
        part._attn_implementation = None
    return config


def open_model(
    kind: Any, source: str | Path | None, *, config: PreTrainedConfig | None = None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with its weights, those of the options where there is no source, and transformers' report on them."""
    base = source
    if source is not None and Path(source, "adapter_config.json").is_file():
        # transformers puts the adapter on the model that lies beside it.
        _adapter_config(Path(source))
        base = source if Path(source, "config.json").is_file() else adapter_base(Path(source))
    if config is None:
        assert base is not None
        config = open_config(base, **{name: options[name] for name in ("gguf_file", "revision") if name in options})
    with _MAKING, reading(f"the weights of {str(source or config.name_or_path)!r}", source):
        model, report = kind.from_pretrained(
            base, config=config, output_loading_info=True, trust_remote_code=False, **options
        )
        if base != source:
            model.load_adapter(str(source))  # whose own path to its base leads nowhere from other folders
        return model, report


def new_model(kind: Any, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model with new weights, or on the meta device none."""
    with _MAKING, reading(f"the config of {config.name_or_path!r}"):
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind._from_config(config, **options)  # type: ignore[no-any-return]
        return kind.from_config(config, trust_remote_code=False, **options)  # type: ignore[no-any-return]


def open_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Tokenizer of a model."""
    check_published(source)
    with reading(f"the tokenizer of {str(source)!r}", source):
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)


def open_adapter(lm: PreTrainedModel, folder: Path) -> Any:
    """A model with a PEFT adapter on it."""
    from peft import PeftModel

    _adapter_config(folder)
    with reading(f"the adapter in {str(folder)!r}", folder):
        return PeftModel.from_pretrained(lm, str(folder))


def adapter_base(folder: Path) -> str:
    """Folder or hub id of the model that a PEFT adapter was trained on."""
    base = _adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"The PEFT adapter {str(folder)!r} names no base model: base_model_name_or_path in its adapter_config.json "
            f"is {base!r}. Set model.base to the model it was trained on and model.adapter to {str(folder)!r}."
        )
    return found_from(base, adapter_places(folder))


def adapter_places(folder: Path) -> list[str | Path]:
    """Folders from which a PEFT adapter's relative path to its base may lead: where it was trained, and its own."""
    # The best one of a run lies right below what the run has written.
    for place in (folder, folder.absolute().parent):
        with suppress(OSError, ValueError, LookupError, TypeError):  # of a run over no relative path, or no run of ours
            return [str(json.loads((place / "run.json").read_text(encoding="utf-8"))[TRAINED_IN]), folder]
    return [folder]


def _adapter_config(folder: Path) -> dict[str, Any]:
    with reading(f"the adapter_config.json in {str(folder)!r}", folder):
        fields = dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
    if module := fields.get("megatron_config") and fields.get("megatron_core"):
        raise CheckpointError(
            f"The adapter in {str(folder)!r} names the module {module!r} to import, and l2d-framework runs no code "
            "that a model brings along. Save the adapter again without megatron_config."
        )
    return fields
