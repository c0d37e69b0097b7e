"""MAUVE: how close the distribution of generated texts is to that of human ones; needs the extra `text-metrics`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from l2d_framework.errors import ConfigError, DataError, install
from l2d_framework.evaluation.statistics import Estimate
from l2d_framework.evaluation.text.judge import Pretrained, Track, batches, pad_right
from l2d_framework.evaluation.text.samples import Sample

FEATURES_MODEL, MAX_LENGTH = "gpt2-large", 256
"""Of TESS 2's evaluation."""


def check_installed() -> None:
    """Refuse when the library is missing."""
    if importlib.util.find_spec("mauve") is None:
        raise ConfigError(
            f"MAUVE needs the library mauve-text, which is not installed. Run: {install('l2d-framework[text-metrics]')}"
        )


def check_golds(samples: Sequence[Sample], name: str) -> None:
    """Refuse samples that cannot be compared with human texts."""
    if lacking := sum(sample.gold is None for sample in samples):
        raise DataError(
            f"MAUVE compares with what humans wrote, and {lacking} of the {len(samples)} samples of {name!r} have no "
            "gold text. Add a column `gold`, name it with --gold-column, or give the texts with --gold."
        )
    if min(sum(bool(s.text) for s in samples), sum(bool(s.gold) for s in samples)) < 2:
        raise DataError(f"MAUVE compares distributions; {name!r} has fewer than 2 texts that are not empty.")


class Features:
    """Last hidden state at a text's last token, as the authors' library takes it; what was read is remembered."""

    def __init__(self, source: Pretrained, *, max_length: int = MAX_LENGTH, batch_size: int = 8) -> None:
        self.source, self.batch_size = source, batch_size
        self.max_length = source.limit(max_length)
        self._known: dict[tuple[int, ...], NDArray[np.float32]] = {}

    @torch.inference_mode()
    def read(self, texts: Sequence[str], track: Track) -> tuple[NDArray[np.float32], int]:
        """Features of non-empty texts, float32, (N, D), and how many texts were cut."""
        whole = [self.source.encode(text) for text in texts]
        cut = [self.source.encode(text, truncation=True, max_length=self.max_length) for text in texts]
        for batch in batches({*cut} - self._known.keys(), self.batch_size, track, "MAUVE features"):
            states = self.source.model(**pad_right(batch, self.source.model.device)).last_hidden_state
            for row, ids in zip(states, batch, strict=True):
                self._known[ids] = row[len(ids) - 1].float().cpu().numpy()
        return np.stack([self._known[ids] for ids in cut]), sum(a != b for a, b in zip(whole, cut, strict=True))


def mauve(samples: Sequence[Sample], features: Features, track: Track, *, with_prefix: bool) -> Estimate:
    """MAUVE of the texts that are not empty (Pillutla et al. 2021, equation 3, settings of the authors' library)."""
    prefixes = [sample.prefix if with_prefix else "" for sample in samples]
    ours = [prefix + sample.text for prefix, sample in zip(prefixes, samples, strict=True)]
    golds = [prefix + (sample.gold or "") for prefix, sample in zip(prefixes, samples, strict=True)]
    human, cut_human = features.read([text for text in golds if text], track)
    machine, cut_machine = features.read([text for text in ours if text], track)
    library: Any = importlib.import_module("mauve")
    score = float(library.compute_mauve(p_features=human, q_features=machine).mauve)
    return Estimate(score, None, len(machine), len(ours) - len(machine), cut_human + cut_machine)
