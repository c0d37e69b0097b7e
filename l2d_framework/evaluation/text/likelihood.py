"""How likely a causal language model finds a text, given its prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.statistics import Values
from l2d_framework.evaluation.text.pretrained import Pretrained, Track, pad_right
from l2d_framework.evaluation.text.samples import Sample

_Ids = tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """What a judge finds of texts.

    Attributes:
        nll: NLL(prefix + text) - NLL(prefix) of each sample in nats, (N,).
        tokens: tokens that the text adds to its prefix, (N,); 0 or less where it adds none.
        truncated: how many samples were cut to the judge's longest input.
        merged: how many prefixes end in other tokens when the text follows, so that the difference is not exactly the
            likelihood of the text given the prefix.
    """

    nll: Values
    tokens: Values
    truncated: int
    merged: int

    @property
    def perplexities(self) -> Values:
        """exp(nll / tokens) of each sample, (N,); NaN where a text adds no token."""
        rates: Values = np.full(len(self.nll), np.nan)
        np.divide(self.nll, self.tokens, out=rates, where=self.tokens > 0)
        return np.asarray(np.exp(rates))


class Judge:
    """A causal language model that finds texts likely or not; what it has judged it remembers.

    Args:
        source: the language model.
        max_length: longest input in tokens, the first one included; the model's own limit when None.
        batch_size: texts at a time; does not change the result.

    Raises:
        ConfigError: if the tokenizer has no token to begin a text with, or `max_length` is below 2.
    """

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
        # Texts of like length share a batch, so that little of it is padding.
        new = sorted(texts - self._known.keys(), key=lambda ids: (len(ids), ids))
        if not new:
            return
        model = self.source.model
        for first in track(range(0, len(new), self.batch_size), "perplexity"):
            batch = new[first : first + self.batch_size]
            inputs = pad_right([(self.start, *ids) for ids in batch], model.device)
            logits = model(**inputs, use_cache=False).logits
            for row, ids in zip(logits, batch, strict=True):
                target = torch.tensor(ids, device=row.device)
                self._known[ids] = float(cross_entropy(row[: len(ids)].float(), target, reduction="sum"))
