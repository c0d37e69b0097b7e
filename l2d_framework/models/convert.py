"""Conversion of other code bases' checkpoints into this package's format."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from l2d_framework.base_model import fetch, fingerprint, load_config, load_language_model, load_tokenizer
from l2d_framework.blame import naming_plugins
from l2d_framework.config import DiffusionRun, ModelSection, parse_run
from l2d_framework.errors import CheckpointError, ConfigError
from l2d_framework.generation.prompts import read_template
from l2d_framework.models.checkpoint import assemble, save
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.origin import Origin
from l2d_framework.opening import make_config, new_model, open_model, reading
from l2d_framework.registry import registry
from l2d_framework.types import ForeignCheckpoint
from l2d_framework.writing import naming_what_fails


def convert(
    source: str,
    out: str | Path,
    *,
    reader: str,
    base: str | None = None,
    classes: tuple[str, ...] | None = None,
    tell: Callable[[str], None] | None = None,
) -> DiffusionLM | PreTrainedModel:
    """Convert a checkpoint, or a reward model, and write it, under a temporary name until it is complete."""
    # A frozen base must equal the weights in the source; without one, the source's own copy is written to `out`/base.
    # A trained one is part of the source, and `base` supplies only what the other code base fails to save.
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} is not empty. Give a new folder, so that nothing is overwritten.")
    folder = fetch(source)
    with reading(repr(source), folder), naming_plugins():
        foreign = registry().converter(reader)(folder)
    if foreign.parts is None and base is not None:
        raise ConfigError(f"{source!r} is a reward model, which has no base, got base={base!r}. Leave it out.")
    conversion = _Conversion(source, folder, foreign, base)
    conversion.check(classes)
    if tell is not None:
        for note in conversion.notes:
            tell(note)
    with _new_folder(out) as stage:
        return conversion.write(stage, out)


class _Conversion:
    """One foreign checkpoint: first checked by shapes alone, then written."""

    def __init__(self, source: str, folder: Path, foreign: ForeignCheckpoint, base: str | None) -> None:
        self.source, self.folder, self.foreign, self.base = source, folder, foreign, base
        self.section = ModelSection(base=str(folder))
        self.config = make_config(source, foreign.base_config)
        kinds: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if foreign.parts is None else MODEL_FOR_CAUSAL_LM_MAPPING
        if type(self.config) not in kinds:
            raise CheckpointError(f"transformers has no suitable model for the model_type of {source!r}.")
        self.kind: Any = kinds[type(self.config)]
        with torch.device("meta"):
            self.shapes: PreTrainedModel = new_model(self.kind, self.config)
        self.run: DiffusionRun | None = None
        self.is_frozen = False
        self.notes = list(foreign.notes)
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def check(self, classes: tuple[str, ...] | None) -> None:
        """Refuse what cannot be converted, by names and shapes alone."""
        if self.foreign.parts is None:
            self._check_language_model()
            return
        count = self.foreign.parts["backbone"].get("num_classes", 0)
        names = [f"class_{i}" for i in range(count)] if classes is None else list(classes)
        if len(names) != count:
            raise ConfigError(f"The checkpoint has {count} classes; {len(names)} names were given: {names}.")
        fields = {"model": {"base": self.base or self.source}, "classes": names, **self.foreign.parts}
        self.run = cast(DiffusionRun, parse_run(fields))
        self.run.backbone.check(self.config, self.run.block_size)
        model = assemble(self.run, self.shapes)
        self.is_frozen = not model.backbone.trains_lm
        if self.base is None or not self.is_frozen:
            self._check_language_model()
        if not self.is_frozen:
            self._check_base()
        wanted, given = (
            {(name, *value.shape) for name, value in part.items()} for part in (_own(model), self.foreign.own)
        )
        missing, unknown = sorted(wanted - given), sorted(given - wanted)
        if missing or unknown:
            raise CheckpointError(
                f"{self.source!r} does not fit its own settings: missing {missing[:3]}, unknown {unknown[:3]}."
            )

    def _check_language_model(self) -> None:
        wanted, given = self.shapes.state_dict(), self.foreign.base
        tied: Mapping[str, str] = {}
        if getattr(self.config, "tie_word_embeddings", False):
            tied = getattr(self.shapes, "_tied_weights_keys", None) or {}
        missing = [name for name in wanted if name not in {*given, *tied, *self.foreign.lost}]
        unknown = [name for name in given if name not in wanted]
        reshaped = [name for name in given if name in wanted and given[name].shape != wanted[name].shape]
        if missing or unknown or reshaped:
            raise CheckpointError(
                f"The language model inside {self.source!r} is incomplete: missing {missing[:3]}, unexpected "
                f"{unknown[:3]}, of another shape than its config says {reshaped[:3]}. "
                + ("Name the original model as `base`." if self.is_frozen else "Download it again.")
            )
        for name, other in tied.items():
            if name in given and other in given and not torch.equal(given[name], given[other]):
                raise CheckpointError(
                    f"{name!r} in {self.source!r} differs from {other!r}, though its config ties them. Set "
                    "tie_word_embeddings in its config.json to false if they were trained apart."
                )
        self.tokenizer = load_tokenizer(self.section)
        if self.tokenizer is not None and len(self.tokenizer) > self.config.vocab_size:
            raise CheckpointError(
                f"The tokenizer of {self.source!r} has {len(self.tokenizer)} tokens and its embedding table only "
                f"{self.config.vocab_size} rows; they do not belong together. Download both again."
            )

    def _check_base(self) -> None:
        if self.base is None:
            for name, reason in self.foreign.lost.items():
                raise CheckpointError(
                    f"{self.source!r} lacks {name!r}. {reason} Name the model it was adapted from as `base` to take it "
                    "from there."
                )
            return
        if not self.foreign.lost:
            raise ConfigError(f"{self.source!r} holds its whole language model, got base={self.base!r}. Leave it out.")
        base_config = load_config(ModelSection(base=self.base))
        for field in ("model_type", "hidden_size", "vocab_size"):
            theirs, ours = getattr(base_config, field), getattr(self.config, field)
            # Adapting may have added tokens, never removed any.
            if theirs != ours and (field != "vocab_size" or theirs > ours):
                raise ConfigError(
                    f"base {self.base!r} has {field}={theirs!r}, {self.source!r} has {ours!r}. Name the model that it "
                    "was adapted from."
                )
        added = self.config.vocab_size - base_config.vocab_size
        for name in self.foreign.lost:
            self.notes.append(
                f"{name} was lost when the checkpoint was saved and comes from {self.base}, not from the training"
                + (f"; rows of the {added} added tokens are the mean of its rows" if added else "")
                + ". Train the model further before judging it."
            )

    def write(self, stage: Path, out: Path) -> DiffusionLM | PreTrainedModel:
        """Write everything to a new folder."""
        if self.run is None:
            return self._write_classifier(stage)
        section = ModelSection(base=self.source)
        if not self.is_frozen:
            lm, read = self._load({**self.foreign.base, **self._supplied()}), self.section
        elif self.base is None:
            lm, read = self._load(self.foreign.base), ModelSection(base=str(stage / "base"))
            lm.save_pretrained(stage / "base")
            section = ModelSection(base=str(out / "base"))
        else:
            section = read = ModelSection(base=self.base)
            lm = load_language_model(section)
            _compare(lm, self.foreign.base)
        model = assemble(self.run, lm)
        with torch.no_grad():
            for name, target in _own(model).items():
                target.copy_(self.foreign.own[name])
        model.origin = Origin(
            model=section,
            fingerprint=fingerprint(read),
            classes=tuple(self.run.classes),
            sampling=self.run.sampling,
            chat_template=read_template(self.foreign.chat_template),
        )
        model.tokenizer = load_tokenizer(read)
        save(model, stage, notes=self._card())
        return model.eval()

    def _write_classifier(self, stage: Path) -> PreTrainedModel:
        model = self._load(self.foreign.base)
        model.save_pretrained(stage)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(stage)
        head = ["---", "library_name: transformers", "pipeline_tag: text-classification", "---", "", "# A reward model"]
        (stage / "README.md").write_text("\n".join([*head, "", self._card()]), encoding="utf-8")
        # safetensors makes files that only their owner can read.
        for path in stage.glob("*.safetensors"):
            shutil.copymode(stage / "README.md", path)
        return model

    def _load(self, state: dict[str, Tensor]) -> PreTrainedModel:
        dtype = reduce(torch.promote_types, (value.dtype for value in state.values()))
        options = {"state_dict": dict(state), "dtype": dtype, "attn_implementation": "sdpa"}
        return open_model(self.kind, None, config=self.config, **options)[0].eval()  # type: ignore[no-any-return]

    def _supplied(self) -> dict[str, Tensor]:
        if not self.foreign.lost:
            return {}
        base = load_language_model(ModelSection(base=str(self.base))).state_dict()
        dtype = next(iter(self.foreign.base.values())).dtype
        supplied = {}
        for name in self.foreign.lost:
            rows = base[name].to(dtype)
            # Each row of an added token is the mean of the others.
            mean = rows.float().mean(0, keepdim=True).to(dtype)
            supplied[name] = torch.cat([rows, mean.expand(self.config.vocab_size - len(rows), *rows.shape[1:])])
        return supplied

    def _card(self) -> str:
        return "\n\n".join([f"Converted from `{self.source}`.", *self.notes]) + "\n"


def _own(model: DiffusionLM) -> dict[str, torch.nn.Parameter]:
    """Parameters of the diffusion model that are not the language model's."""
    others = {id(parameter) for parameter in model.backbone.lm.parameters()}
    return {name: p for name, p in model.own_parameters().items() if id(p) not in others}


def _compare(lm: PreTrainedModel, wanted: Mapping[str, Tensor]) -> None:
    state: dict[str, Tensor] = lm.state_dict()
    for name, value in wanted.items():
        if name in state and not torch.equal(state[name].to(value.dtype), value):
            raise CheckpointError(
                f"{name!r} in the checkpoint differs from the base model's, so the diffusion path was trained over "
                "another model. Leave `base` out to use the checkpoint's own copy."
            )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end and vanishes on an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        # A folder made by mkdtemp is its owner's alone; this one is made like any other.
        stage = around / "new"
        stage.mkdir()
        with naming_what_fails(out, stage):
            yield stage
        try:
            os.replace(stage, out)
        except OSError as error:
            raise ConfigError(
                f"{str(out)!r} was filled by another process meanwhile. Give a new folder; nothing is overwritten."
            ) from error
    finally:
        shutil.rmtree(around, ignore_errors=True)
