"""Denoising loss on a run's held-out data: before and after training, by time, beside the language model's own."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from l2d_bench.measures.base import Measure, Outcome, Subject, Value

if TYPE_CHECKING:
    from torch import Tensor

    from l2d_framework.config import DiffusionRun
    from l2d_framework.models.diffusion_lm import DiffusionLM

_BATCH = 16


class HeldOutMeasure(Measure):
    """Cross-entropy of held-out tokens in nats, with self-conditioning and noise that every call repeats.

    `after` is the model's, `before` that of what its run started from, `after_text` and `before_text` the same without
    padding. Where the language model stays what it is, `base` is its loss on the same tokens, and `entropy` that of
    their frequencies; `noise` is the loss at t below 0.1, `data` that above 0.9, and each `_difference` what it is more
    than `base`; `rises` counts the tenths of t at which that is, by two standard errors, more than at the one before.
    """

    kind: Literal["held_out"] = "held_out"

    def run(self, subject: Subject) -> Outcome:
        """Measure.

        Args:
            subject: a diffusion model that was trained here.

        Returns:
            The losses, and both of tenths of t as curves; nothing for any other model.
        """
        from l2d_framework.config import DiffusionRun
        from l2d_framework.config.parsing import parse_run
        from l2d_framework.models.checkpoint import build_model
        from l2d_framework.models.unloaded import UnloadedModel

        run = None if subject.card is None else parse_run(subject.card["config"])
        if not isinstance(run, DiffusionRun):
            return Outcome()
        after = _losses(
            UnloadedModel(subject.path, base=None, dtype="float32", revision=None).load(subject.device), run
        )
        before = _losses(build_model(run).to(subject.device).eval(), run)
        values = {}
        for name, found in (("before", before), ("after", after)):
            text = found.each[found.is_text]
            values[name] = Value(value=found.each.mean().item(), items=len(found.each))
            values[f"{name}_text"] = Value(value=text.mean().item(), items=len(text))
        more, curves = ({}, {}) if after.base is None else _by_time(after, after.base)
        return Outcome(values=values | more, curves=curves)


class _Losses(NamedTuple):
    """Of each held-out target: time, loss, whether it is text, the target, the language model's loss if it has one."""

    t: Tensor
    each: Tensor
    is_text: Tensor
    targets: Tensor
    base: Tensor | None


def _losses(lm: DiffusionLM, run: DiffusionRun) -> _Losses:
    import torch

    from l2d_framework.diffusion.loss import chunked_cross_entropy, denoising_loss
    from l2d_framework.diffusion.training_noise import NoiseRule, draw
    from l2d_framework.training.data.collate import IGNORED, Collator
    from l2d_framework.training.data.masking import Masker
    from l2d_framework.training.data.prepare import prepare
    from l2d_framework.types import Layout

    assert run.data is not None and lm.tokenizer is not None  # of a run that was trained
    data, pad = run.data, lm.tokenizer.pad_token_id
    masker = None if data.masking is None else Masker(tuple(data.masking.objectives), 1, 0)
    collate = Collator(pad, run.block_size, padding=data.padding, max_length=data.max_length, masker=masker)
    rows: Any = prepare(data, lm.tokenizer, seed=run.seed).eval
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(rows), _BATCH):
        batch = collate([rows[i] for i in range(start, min(start + _BATCH, len(rows)))])
        batch = {name: value.to(lm.device) for name, value in batch.items()}
        layout, counted = Layout(batch["input_ids"], batch["blocks"]), batch["labels"] != IGNORED
        keys: list[tuple[int | str, ...]] = [("quality", i) for i in batch["index"].tolist()]
        draws = draw(lm, layout, NoiseRule(keys=keys, self_conditioning=1.0, is_first_noisier=False, fixed_times=True))
        with torch.no_grad():
            found = denoising_loss(lm, layout, draws, counted=counted)
            chosen = draws.valid & counted.gather(1, draws.positions)
            targets = layout.tokens.gather(1, draws.positions)[chosen]
            part = [found.t, found.cross_entropies, found.position < batch["length"][found.row], targets]
            if lm.backbone.identity_at_zero:
                plain = lm.backbone.plain(draws.positions, lm.backbone.read(layout))[chosen]
                part.append(chunked_cross_entropy(lm.backbone.head, plain, targets, chunk=1024)[1].double())
        parts.append(tuple(part))
    t, each, is_text, targets, *base = (torch.cat(part) for part in zip(*parts, strict=True))
    return _Losses(t.double(), each.double(), is_text, targets, base[0] if base else None)


def _by_time(found: _Losses, base: Tensor) -> tuple[dict[str, Value], dict[str, list[list[float]]]]:
    from l2d_framework.training.metrics import BINS

    bins, total = (found.t * BINS).long(), len(found.targets)
    counts = Counter(found.targets.tolist()).values()
    losses, differences = [], []
    for i in range(BINS):
        own, more = found.each[bins == i], (found.each - base)[bins == i]
        losses.append(Value(value=own.mean().item(), items=len(own)))
        error = more.std().item() / math.sqrt(len(more))
        differences.append(Value(value=more.mean().item(), error=error, items=len(more)))
    rises = sum(b.value >= a.value + 2 * (b.error or 0.0) for a, b in pairwise(differences))
    values = {
        "base": Value(value=base.mean().item(), items=total),
        "entropy": Value(value=-sum(n / total * math.log(n / total) for n in counts), items=total),
        "noise": losses[0],
        "noise_difference": differences[0],
        "data": losses[-1],
        "data_difference": differences[-1],
        "rises": Value(value=float(rises), items=BINS - 1),
    }
    middles = [(i + 0.5) / BINS for i in range(BINS)]
    curves = {
        name: [[t, one.value] for t, one in zip(middles, points, strict=True)]
        for name, points in (("loss", losses), ("more_than_the_language_model", differences))
    }
    return values, curves
