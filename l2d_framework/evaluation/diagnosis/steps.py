"""Do evaluations pay? Held-out tokens solved from noise, the true tokens before each given."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2d_framework.blame import naming_plugins
from l2d_framework.config import SamplingSection
from l2d_framework.diffusion.sampler import Block, Sampler
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation import plots
from l2d_framework.evaluation.diagnosis.batches import Batch, batches
from l2d_framework.evaluation.diagnosis.diagnose import Track
from l2d_framework.evaluation.statistics import Estimate, ratio
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.unloaded import UnloadedModel
from l2d_framework.solver import Solver

DEFINITIONS = {
    "accuracy": "share of held-out tokens that are the likeliest at the read-out, the true tokens before each given",
    "nll": "nats per held-out token at the read-out of one solve, the true tokens before each given; no bound on the "
    "likelihood of a text",
    "evaluations": "of the network, per token, the read-out included",
    "over_fewer": "difference to the setting of the same solver before it, row by row",
    "over_language_model": "difference to num_inference_steps=0, row by row",
    "seconds": "of all solves; reading the rows, once for all settings, is left out",
    "standard_error": "over rows",
}

Sums = Mapping[str, Tensor]
"""Of tokens of each row, (B,), float64: how many there are, how many are right, their losses and evaluations."""


def possible(
    source: UnloadedModel, options: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> list[SamplingSection]:
    """The plain language model, where 0 is among `counts`, and for each of `options` the counts its solver can make.

    An adaptive solver makes its own number. Raises ConfigError where a solver can make none.
    """
    wanted, settings = sorted(set(counts)), []
    if wanted == [0] or (wanted[0] == 0 and source.empty.identity_at_zero):
        others = {name: value for name, value in options[0].items() if name != "solver"}
        settings.append(source.sampling(others | {"num_inference_steps": 0}))
    if source.is_plain and settings:
        return settings
    for fields in options:
        solver = source.origin.settings(source.parts.parametrization, fields, tokenizer=source.tokenizer).solver
        made: Sequence[int | None] = [count for count in wanted if count and not _obstacle(solver, count)]
        if solver.is_adaptive:
            made = [None]
        elif not made and wanted[-1]:
            solver.grid_size(wanted[-1])  # says which numbers it can make
        settings += [source.sampling({**fields, "num_inference_steps": count}) for count in made]
    return settings


def left_out(source: UnloadedModel, options: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> list[str]:
    """Why a model or a solver among `options` is not measured with some of `counts`."""
    if source.is_plain:
        return []
    reasons = [] if 0 not in counts or source.empty.identity_at_zero else ["0, as the language model is not in it."]
    for fields in options:
        solver = source.origin.settings(source.parts.parametrization, fields, tokenizer=source.tokenizer).solver
        if not solver.is_adaptive:
            reasons += [reason for count in sorted(set(counts)) if count and (reason := _obstacle(solver, count))]
    return reasons


def _obstacle(solver: Solver, count: int) -> str | None:
    try:
        solver.grid_size(count)
    except ConfigError as error:
        return str(error)
    return None


@torch.no_grad()
@naming_plugins()
def eval_steps(
    model: DiffusionLM,
    rows: Sequence[Mapping[str, Any]],
    settings: Sequence[SamplingSection],
    *,
    batch_size: int,
    track: Track = iter,
) -> dict[str, Any]:
    """Accuracy and negative log-likelihood of true tokens under each setting.

    All tokens of a row are solved at once given their true past, so that a hundred thousand cost little and the error
    is a few tenths of a percent. `by_row` of the result holds sums in the order of the data, by which two models are
    compared in pairs.
    """
    samplers = [Sampler.of(model, sampling) for sampling in settings]
    seconds = [0.0] * len(settings)
    by_batch: list[list[Sums]] = [[] for _ in settings]
    order: list[int] = []
    for batch in track(batches(model, rows, seed=settings[0].seed, size=batch_size)):
        order += batch.rows
        context = model.backbone.read(batch.layout)
        for number, sampler in enumerate(samplers):
            start = time.perf_counter()
            portions = [_solve(sampler, part, part.block(context)) for part in batch.portions(model)]
            seconds[number] += time.perf_counter() - start
            by_batch[number].append({name: sum(part[name] for part in portions) for name in portions[0]})  # type: ignore[misc]
    places = torch.tensor(order).argsort()
    sums = [{name: torch.cat([totals[name] for totals in each])[places] for name in each[0]} for each in by_batch]
    solvers = [_solver(sampling) for sampling in settings]
    found = []
    for number, (sampling, solver, here) in enumerate(zip(settings, solvers, sums, strict=True)):
        entry = {
            "solver": solver,
            "num_inference_steps": sampling.num_inference_steps,
            "evaluations": ratio(here["evaluations"], here["tokens"]).to_json(),
            **_means(here),
        }
        if number and solvers[number - 1] == solver:
            entry["over_fewer"] = _means(here, sums[number - 1])
        if solver is not None and solvers[0] is None:
            entry["over_language_model"] = _means(here, sums[0])
        by_row = {"right": here["right"].long().tolist(), "nll": here["nll"].tolist()}
        found.append(entry | {"seconds": seconds[number], "by_row": by_row})
    tokens = sums[0]["tokens"].long()
    return {
        "rows": len(tokens),
        "tokens": int(tokens.sum()),
        "settings": found,
        "tokens_by_row": tokens.tolist(),
        "definitions": DEFINITIONS,
    }


def _means(here: Sums, other: Sums | None = None) -> dict[str, Any]:
    """Means over tokens, or how much more they are than under another setting."""
    names = {"accuracy": "right", "nll": "nll"}
    sums = {label: here[name] - (0 if other is None else other[name]) for label, name in names.items()}
    return {label: ratio(values, here["tokens"]).to_json() for label, values in sums.items()}


def _solver(sampling: SamplingSection) -> str | None:
    """Name of the solver; None for the plain language model."""
    return None if sampling.num_inference_steps == 0 else sampling.solver.component_name()


def _solve(sampler: Sampler, batch: Batch, block: Block) -> Sums:
    """Sums over the positions of each row, (B,), float64, on the host."""
    found, targets, valid = sampler(block), batch.targets, batch.valid
    right, losses = torch.zeros_like(valid), torch.zeros_like(valid, dtype=torch.float32)
    for where, logits in found.logits.parts():
        right[:, where] = logits.argmax(-1) == targets[:, where]
        logarithms = logits.float().log_softmax(-1)
        losses[:, where] = -logarithms.gather(-1, targets[:, where, None])[..., 0]
    each = {"tokens": valid, "right": right, "nll": losses, "evaluations": found.evaluations}
    return {name: values.masked_fill(~valid, 0).sum(1, dtype=torch.float64).cpu() for name, values in each.items()}


def table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each setting; a change is that from the row above."""
    # A setting is one cell, since the first column stands in every part where a terminal is narrow.
    rows: list[tuple[str, ...]] = [("evaluations", "accuracy, %", "change, %", "nats/token", "change, nats")]
    for entry in result["settings"]:
        more = entry.get("over_fewer", {})
        setting = f"{entry['evaluations']['value']:.4g} {entry['solver'] or ''}".rstrip()
        accuracy = _shown(entry["accuracy"], 100), _shown(more.get("accuracy"), 100)
        rows.append((setting, *accuracy, _shown(entry["nll"]), _shown(more.get("nll"))))
    return rows


def sentences(result: Mapping[str, Any]) -> list[str]:
    """For each solver how far its evaluations pay; what is within two standard errors is no difference."""
    lines = []
    for solver, entries in _by_solver(result).items():
        if len(entries) > 1:
            words = (
                _verdict(entries, result, "accuracy", "right", 100),
                _verdict(entries, result, "likelihood", "nll", -1),
            )
            lines.append(f"Do evaluations pay? {solver}: {'; '.join(words)}.")
    return lines


def _verdict(entries: list[dict[str, Any]], result: Mapping[str, Any], name: str, sums: str, scale: float) -> str:
    """How far one measure gets better; its sums by row times `scale` are to be high, and in units for readers."""
    tokens, unit = np.array(result["tokens_by_row"]), "points" if sums == "right" else "nats"

    def gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> Estimate:
        here, there = (np.array(entry["by_row"][sums]) * scale for entry in (before, after))
        return ratio(there - here, tokens)

    def count(entry: Mapping[str, Any]) -> str:
        return f"{entry['evaluations']['value']:.4g}"

    first, last = entries[0], entries[-1]
    best = max(entries, key=lambda entry: sum(entry["by_row"][sums]) * scale)
    # The fewest evaluations that are as good as the best, as far as can be seen.
    enough = next(entry for entry in entries if not gain(entry, best).is_clear)
    words = []
    if enough is not first:
        enough = enough if gain(first, enough).is_clear else best
        words.append(f"better by {gain(first, enough)} {unit} from {count(first)} to {count(enough)}")
    if (loss := gain(last, best)).is_clear:
        words.append(f"worse by {loss} {unit} from {count(best)} to {count(last)}")
    elif enough is not last:
        words.append(f"no difference seen between {count(enough)} and {count(last)}")
    return f"{name} {', '.join(words)}"


def _estimate(numbers: Mapping[str, Any], scale: float = 1) -> Estimate:
    value, error = (
        None if number is None else number * scale for number in (numbers["value"], numbers["standard_error"])
    )
    return Estimate(value, error, numbers["samples"])


def _shown(numbers: Mapping[str, Any] | None, scale: float = 1) -> str:
    # In one word, which fits a usual terminal and is never wrapped.
    return "" if numbers is None else str(_estimate(numbers, scale)).replace(" ± ", "±")


def _by_solver(result: Mapping[str, Any]) -> dict[str | None, list[dict[str, Any]]]:
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for entry in result["settings"]:
        groups.setdefault(entry["solver"], []).append(entry)
    return groups


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy and negative log-likelihood against evaluations; the language model is a line across."""
    figure = plots.figure(10, 4.4)
    panels = zip(figure.subplots(1, 2), (("accuracy", "accuracy, %", 100), ("nll", "nats per token", 1)), strict=True)
    for axes, (name, label, scale) in panels:
        for (solver, entries), colour in zip(_by_solver(result).items(), cycle(plots.COLOURS)):
            found = [(entry["evaluations"]["value"], _estimate(entry[name], scale)) for entry in entries]
            if solver is None:
                axes.axhline(found[0][1].value, color=plots.BLACK, linestyle="--", label="language model")
                continue
            drawn = [(count, estimate.value or 0.0, estimate.standard_error) for count, estimate in found]
            plots.points(axes, drawn, color=colour, marker="o", label=solver)
        counts = sorted({round(entry["evaluations"]["value"]) for entry in result["settings"]} - {0})
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set(xlabel="network evaluations per token", ylabel=f"{label} (± standard error)")
        axes.grid(alpha=0.25)
    plots.legend_below(figure)
    plots.save(figure, path)
