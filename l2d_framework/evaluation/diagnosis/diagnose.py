"""All of a diagnosis: from a model and held-out rows to what is written about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from l2d_framework.blame import naming_plugins
from l2d_framework.config import SamplingSection
from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.diffusion.sampler import Sampler
from l2d_framework.errors import EvaluationBudgetError
from l2d_framework.evaluation.diagnosis.batches import Batch, batches
from l2d_framework.evaluation.diagnosis.curves import ANCHORS, TokenLikelihood, cross_entropies
from l2d_framework.evaluation.statistics import Estimate, ratio
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.schedule import NoiseLaw

Track = Callable[[Sequence[Batch]], Iterable[Batch]]
"""Passes batches through and shows how far they are."""

NEGLIGIBLE = 1e-3
"""Nats per token below which an advantage counts as none; rounding is far smaller."""

DEFINITIONS = {
    "cross_entropy": "nats per token of the true token given its state x_t on the true path, the true tokens before it "
    "given; `combination` is softmax(log p_0(y) + log N(x_t; alpha(t) clean(y), (sigma(t) prior_scale)^2 I)) with the "
    "network's own prediction p_0 from noise alone, `combination_after_first_move` the same with its prediction at the "
    "second time, the likelihood of that state divided out; a network of blocks of several tokens also sees its "
    "neighbours' states, which the combinations do not; guidance takes no part, though it does in what is solved",
    "gain": "cross-entropy of the combination minus that of the network, averaged over the later times of the grid, "
    "in nats per token; above 0 the network knows more than its own earlier prediction and the hint in x_t, which is "
    f"what further evaluations can bring out. Verdict at 2 standard errors, against {NEGLIGIBLE:g}",
    "settled": "share of tokens that from this evaluation on are what they are at the read-out",
    "evaluations": "network evaluations per token, the read-out included",
    "standard_error": "over rows",
}


@dataclass(frozen=True)
class Settings:
    """How to diagnose."""

    times: Sequence[float]  # at which cross-entropies are taken, from `time_grid`
    sampling: SamplingSection  # with a solver of fixed steps
    adaptive: SamplingSection | None  # the same with an adaptive one


def time_grid(schedule: NoiseLaw, count: int) -> list[float]:
    """Times as a solver would visit them, those without noise left out; at the first the state is noise alone."""
    return schedule.grid(count + 1, 1.0)[:count]


def verdict(gain: Estimate) -> Literal["gains", "does not gain", "not clear"]:
    """Whether all of a gain, in nats per token, ± 2 standard errors is above `NEGLIGIBLE`, or all of it below."""
    if gain.value is None or gain.standard_error is None:
        return "not clear"
    if gain.value - 2 * gain.standard_error > NEGLIGIBLE:
        return "gains"
    return "does not gain" if gain.value + 2 * gain.standard_error < NEGLIGIBLE else "not clear"


@dataclass(frozen=True)
class _Trajectories:
    """Likeliest tokens along the way; L positions of B rows, true tokens before them given."""

    times: list[float]  # of each evaluation, the read-out last
    tokens: Tensor  # at each evaluation, (evaluations, B, L), int64
    base: Tensor  # of the base model, or of the first evaluation where the network has none in it, (B, L), int64

    @property
    def settled(self) -> Tensor:
        """Whether a token is, from this evaluation on, what it is in the end, (evaluations, B, L), bool."""
        same = self.tokens == self.tokens[-1]
        return same.flip(0).long().cumprod(0).flip(0).bool()


def _solve(model: DiffusionLM, batch: Batch, context: Any, sampling: SamplingSection) -> _Trajectories:
    """Solve every position from noise of its own and note the likeliest token at every evaluation."""
    times: list[float] = []
    tokens: list[Tensor] = []

    def note(evaluation: Evaluation) -> None:
        times.append(float(evaluation.t.flatten()[0]))
        tokens.append(evaluation.logits.argmax(-1).cpu())

    Sampler.of(model, sampling, note)(batch.block(context))
    if not model.backbone.identity_at_zero:
        return _Trajectories(times, torch.stack(tokens), tokens[0])
    plain = Sampler.of(model, sampling.model_copy(update={"num_inference_steps": 0}))(batch.block(context))
    base = torch.cat([logits.argmax(-1) for _, logits in plain.logits.parts()], 1)
    return _Trajectories(times, torch.stack(tokens), base.cpu())


@torch.no_grad()
@naming_plugins()
def diagnose(
    model: DiffusionLM,
    rows: Sequence[Mapping[str, Any]],
    settings: Settings,
    *,
    batch_size: int,
    track: Track = iter,
) -> dict[str, Any]:
    """What held-out text says about further evaluations."""
    likelihood = TokenLikelihood(model)
    by_batch: list[dict[str, Tensor]] = []
    spent: list[int] | EvaluationBudgetError = []
    moves: list[float] = []
    for batch in track(batches(model, rows, seed=settings.sampling.seed, size=batch_size)):
        # What the portions of a batch add belongs to the same rows.
        totals: dict[str, Tensor] = {}
        context = model.backbone.read(batch.layout)
        for part in batch.portions(model):
            curves = cross_entropies(model, part, context=context, times=settings.times, likelihood=likelihood)
            way = _solve(model, part, context, settings.sampling)
            moves, valid, last = way.times, part.valid.cpu(), way.tokens[-1]
            targets = part.targets.cpu()
            here = {
                "tokens": valid.sum(1),
                "network": curves.network,
                "combined": curves.combined,
                "settled": (way.settled & valid).sum(2).T,
                "differs": ((last != way.base) & valid).sum(1),
                "right": ((last == targets) & valid).sum(1),
                "base_right": ((way.base == targets) & valid).sum(1),
            }
            totals = {name: totals[name] + value if totals else value for name, value in here.items()}
            if settings.adaptive is not None and isinstance(spent, list):
                try:
                    solved = Sampler.of(model, settings.adaptive)(part.block(context))
                    spent += solved.evaluations[part.valid].tolist()
                except EvaluationBudgetError as error:
                    spent = error
        by_batch.append(totals)
    sums = {name: torch.cat([totals[name].double() for totals in by_batch]) for name in by_batch[0]}
    tokens = sums["tokens"]
    return {
        "rows": len(tokens),
        "tokens": int(tokens.sum()),
        **_curves(sums, settings.times),
        "settled": [
            {"t": t, "share": ratio(share, tokens).to_json()} for t, share in zip(moves, sums["settled"].T, strict=True)
        ],
        "evaluations": None if settings.adaptive is None else _spent(spent, settings.adaptive),
        "answers": {
            "base": "language model" if model.backbone.identity_at_zero else "first evaluation",
            **{name: ratio(sums[name], tokens).to_json() for name in ("differs", "right", "base_right")},
        },
        "definitions": DEFINITIONS,
    }


def _curves(sums: Mapping[str, Tensor], times: Sequence[float]) -> dict[str, Any]:
    tokens, network, combined = sums["tokens"], sums["network"], sums["combined"]
    names = ("combination", "combination_after_first_move")
    points = [
        {"t": t, "network": ratio(network[:, number], tokens).to_json()}
        | {
            names[anchor]: ratio(combined[:, anchor, number], tokens).to_json()
            for anchor in range(min(ANCHORS, number + 1))
        }
        for number, t in enumerate(times)
    ]
    gains = {}
    for anchor in range(ANCHORS):
        later = slice(anchor + 1, None)  # at its own time the combination is the network itself
        gain = ratio((combined[:, anchor, later] - network[:, later]).mean(1), tokens)
        gains[f"over_{names[anchor]}"] = gain.to_json() | {"verdict": verdict(gain)}
    return {"cross_entropy": points, "gain": gains}


def _spent(counts: list[int] | EvaluationBudgetError, sampling: SamplingSection) -> dict[str, Any]:
    solver = sampling.solver.to_json()
    if isinstance(counts, EvaluationBudgetError):
        return {"solver": solver, "failed": str(counts)}
    return {
        "solver": solver,
        "mean": float(np.mean(counts)),
        "p95": int(np.quantile(counts, 0.95, method="inverted_cdf")),
        "histogram": dict(sorted(Counter(counts).items())),
    }
