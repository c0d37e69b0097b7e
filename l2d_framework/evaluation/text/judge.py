"""Models that judge texts: checked without their weights, loaded when needed, and how likely they find a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModel, AutoModelForCausalLM

from l2d_framework import opening
from l2d_framework.base_model import fetch, load_tokenizer
from l2d_framework.errors import CheckpointError, ConfigError, MissingModelError
from l2d_framework.evaluation.statistics import Values
from l2d_framework.evaluation.text.samples import Sample
from l2d_framework.models.labels import MANIFEST
from l2d_framework.models.manifest import base_reference, read_manifest
from l2d_framework.opening import open_config, open_model

Track = Callable[[Sequence[int], str], Iterable[int]]
"""Passes batches through and shows how far they are; gets the batches and a title."""


@dataclass
class Pretrained:
    """A model, its weights loaded when first used."""

    name: str
    config: Any
    tokenizer: Any
    load: Callable[[], Any]

    @cached_property
    def model(self) -> Any:
        """The model."""
        return self.load()

    def limit(self, wanted: int | None) -> int | None:
        """Longest text, in tokens, that the model's positions and the user allow; None for no limit."""
        own = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return min((limit for limit in (wanted, own) if limit is not None), default=None)

    def encode(self, text: str, **options: Any) -> tuple[int, ...]:
        """Token ids of a text."""
        ids = tuple(self.tokenizer(text, verbose=False, **options)["input_ids"])
        known = self.config.get_text_config().vocab_size
        if max(ids, default=0) >= known:
            raise ConfigError(
                f"The tokenizer of {self.name!r} gave token {max(ids)} for {text[:40]!r}, but the model has only "
                f"{known:,} tokens. Name a model whose files belong together."
            )
        return ids


def pretrained(path: str, *, causal: bool, device: str, dtype: str) -> Pretrained:
    """A model from a folder or the hub, checked without its weights; `causal`: next tokens are wanted, too."""
    folder = fetch(path)
    if (folder / MANIFEST).is_file():
        raise ConfigError(f"{path!r} is a diffusion model, which judges no texts. Name a plain language model.")
    config: Any = open_config(folder)
    auto, known = (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING) if causal else (AutoModel, MODEL_MAPPING)
    if type(config) not in known:
        kind = "causal language model" if causal else "model with hidden states"
        raise ConfigError(f"{path!r} is a {config.model_type!r}, which transformers knows as no {kind}. Name another.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ConfigError(f"{str(folder)!r} holds no *.safetensors or *.bin weights. Name another model.")
    tokenizer = open_tokenizer(path)
    size = config.get_text_config().vocab_size
    # Tokens added to a tokenizer may lie beyond a model that never meets them.
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"The tokenizer of {path!r} has {tokenizer.vocab_size:,} tokens and the model {size:,}. They do not "
            "belong together; name another folder."
        )

    def load() -> Any:
        model: Any
        model, report = open_model(auto, folder, dtype=dtype)
        if causal and report["missing_keys"]:
            raise ConfigError(
                f"{path!r} lacks the weights {sorted(report['missing_keys'])[:3]}, which would be random. Name another."
            )
        return model.eval().to(device)

    return Pretrained(path, config, tokenizer, load)


def open_tokenizer(path: str) -> Any:
    """Tokenizer of a language model, or of an l2d-framework checkpoint's base model."""
    tokenizer: Any = None
    try:
        if (Path(path) / MANIFEST).is_file():
            tokenizer = load_tokenizer(base_reference(path, read_manifest(path)))
        elif Path(path).is_dir() or path.count("/") < 2:
            tokenizer = opening.open_tokenizer(path)
    except (CheckpointError, MissingModelError) as error:
        raise ConfigError(
            f"No tokenizer can be read from {path!r} ({str(error).partition(chr(10))[0]}). Name the folder or hub id "
            "of a language model."
        ) from error
    if tokenizer is None or not len(tokenizer):
        raise ConfigError(f"There is no tokenizer in {path!r}. Name the folder or hub id of a language model.")
    return tokenizer


_Ids = tuple[int, ...]


def batches(texts: set[_Ids], size: int, track: Track, title: str) -> Iterator[list[_Ids]]:
    """Texts of like length together, so that little of a batch is padding; no progress is shown of none."""
    order = sorted(texts, key=lambda ids: (len(ids), ids))
    for first in track(range(0, len(order), size), title) if order else ():
        yield order[first : first + size]


def pad_right(batch: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Network input for texts of different lengths; what is padded is masked."""
    width = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
    return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class Likelihood:
    """What a judge finds of texts."""

    nll: Values  # NLL(prefix + text) - NLL(prefix) of each sample in nats, (N,)
    tokens: Values  # tokens that the text adds to its prefix, (N,); 0 or less where it adds none
    truncated: int  # samples cut to the judge's longest input
    merged: int  # prefixes that end in other tokens when the text follows, where `nll` is not quite that of the text

    @property
    def perplexities(self) -> Values:
        """exp(nll / tokens) of each sample, (N,); NaN where a text adds no token."""
        rates: Values = np.full(len(self.nll), np.nan)
        np.divide(self.nll, self.tokens, out=rates, where=self.tokens > 0)
        return np.asarray(np.exp(rates))


class Judge:
    """A causal language model that finds texts likely or not; what it has judged it remembers."""

    def __init__(self, source: Pretrained, *, max_length: int | None = None, batch_size: int = 8) -> None:
        tokenizer = source.tokenizer
        # Some families begin documents with the token that ends them and have no other.
        starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
        if not starts:
            raise ConfigError(
                f"The tokenizer of {source.name!r} has neither a beginning-of-text nor an end-of-text token, so the "
                "first token of a text has no probability. Name another model."
            )
        self.source, self.start, self.batch_size = source, int(starts[0]), batch_size
        self.max_length = source.limit(max_length)
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"The longest input must be at least 2 tokens, got {self.max_length}.")
        self._known: dict[_Ids, float] = {(): 0.0}

    def judge(self, samples: Sequence[Sample], track: Track) -> Likelihood:
        """Likelihoods of texts given their prefixes, each text begun with the beginning-of-text token.

        Too long ones keep their beginning.
        """
        whole = [self._encode(sample.prefix + sample.text) for sample in samples]
        prefixes = [self._encode(sample.prefix) for sample in samples]
        merged = sum(long[: len(short)] != short for long, short in zip(whole, prefixes, strict=True))
        # One token is taken by the beginning of the text.
        room = None if self.max_length is None else self.max_length - 1
        truncated = sum(room is not None and len(ids) > room for ids in whole)
        whole, prefixes = [ids[:room] for ids in whole], [ids[:room] for ids in prefixes]
        self._learn({*whole, *prefixes}, track)
        pairs = list(zip(whole, prefixes, strict=True))
        return Likelihood(
            nll=np.array([self._known[long] - self._known[short] for long, short in pairs]),
            tokens=np.array([float(len(long) - len(short)) for long, short in pairs]),
            truncated=truncated,
            merged=merged,
        )

    def _encode(self, text: str) -> _Ids:
        ids = self.source.encode(text, add_special_tokens=False)
        # A prompt may spell out the token that every text is begun with.
        return ids[1:] if ids[:1] == (self.start,) else ids

    @torch.inference_mode()
    def _learn(self, texts: set[_Ids], track: Track) -> None:
        for batch in batches(texts - self._known.keys(), self.batch_size, track, "perplexity"):
            model = self.source.model
            inputs = pad_right([(self.start, *ids) for ids in batch], model.device)
            logits = model(**inputs, use_cache=False).logits
            for row, ids in zip(logits, batch, strict=True):
                target = torch.tensor(ids, device=row.device)
                self._known[ids] = float(cross_entropy(row[: len(ids)].float(), target, reduction="sum"))
