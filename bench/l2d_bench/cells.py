"""From stored results to the numbers of a table, with the paper's beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from l2d_bench.files import paper_value
from l2d_bench.jobs import Job
from l2d_bench.measures.base import Outcome, Value
from l2d_bench.plan import CellPlan, Plan
from l2d_bench.schema import Column, ProfileFile
from l2d_framework.evaluation.statistics import standard_error

FAILED = "failed"
"""Why a cell has no number: its job, or one before it, failed."""
NOT_RUN = "not run yet"
"""The same where nothing failed: the run was cut short."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        value: mean over seeds.
        error: its standard error over items; None where a number has none.
        seeds: the value and error of each seed, by seed.
        items: number of items.
        reason: why there is no value: "no data", "not rerun", "failed", "not run yet" or "".
        text: the reason in words.
        paper: what the paper prints.
        jobs: keys of the results.
    """

    value: float | None = None
    error: float | None = None
    seeds: dict[int, dict[str, Any]] = field(default_factory=dict)
    items: int | None = None
    reason: str | None = None
    text: str = ""
    paper: float | str | None = None
    jobs: tuple[str, ...] = ()

    @property
    def spread(self) -> float | None:
        """Standard error over seeds: what training and noise add; None for one seed."""
        return standard_error([one["value"] for one in self.seeds.values()])


@dataclass
class Filled:
    """A table with its numbers.

    Attributes:
        plan: of the table.
        cells: by number of the row and name of the column.
        outcomes: what each measurement found, by key of its job.
        records: the stored results, by key.
    """

    plan: Plan
    cells: dict[tuple[int, str], Cell]
    outcomes: dict[str, Outcome]
    records: dict[str, dict[str, Any]]

    @property
    def has_failed(self) -> bool:
        """Whether a cell lacks its number because a job failed."""
        return any(cell.reason == FAILED for cell in self.cells.values())


def fill(plan: Plan, profile: ProfileFile, failures: Mapping[str, str]) -> Filled:
    """Numbers of a table.

    Args:
        plan: of the table.
        profile: the profile.
        failures: why jobs failed, by key.

    Returns:
        The table with its numbers; a cell whose results are not there yet, or failed, says so.
    """
    records = {
        key: _read(plan.jobs[key]) for cell in plan.cells.values() for key in cell.jobs if plan.jobs[key].is_done
    }
    outcomes = {key: Outcome.model_validate_json(json.dumps(record["outcome"])) for key, record in records.items()}
    cells: dict[tuple[int, str], Cell] = {}
    for (number, name), planned in plan.cells.items():
        row = plan.rows[number]
        paper = paper_value(plan.table, row.paper_row or row.label, name)
        cells[number, name] = _measured(planned, profile.seeds, outcomes, failures, paper)
    for (number, name), planned in plan.cells.items():
        if planned.column is not None and planned.column.mean is not None:
            members = [cells[number, member] for member in planned.column.mean]
            cells[number, name] = _average(members, planned.column, cells[number, name].paper)
    return Filled(plan, cells, outcomes, records)


def _read(job: Job) -> dict[str, Any]:
    return dict(json.loads(job.output.read_text(encoding="utf-8")))


def _measured(
    planned: CellPlan,
    seeds: Sequence[int],
    outcomes: Mapping[str, Outcome],
    failures: Mapping[str, str],
    paper: float | str | None,
) -> Cell:
    if planned.column is None or planned.column.mean is not None:
        return Cell(reason=planned.reason, text=planned.text, paper=paper, jobs=planned.jobs)
    for key in planned.jobs:
        if key not in outcomes:
            reason = FAILED if key in failures else NOT_RUN
            return Cell(reason=reason, text=failures.get(key, ""), paper=paper, jobs=planned.jobs)
    found = {}
    for seed, key in zip(seeds, planned.jobs, strict=True):
        value, problem = _pick(outcomes[key], planned.column)
        if value is None:
            return Cell(reason=FAILED if problem else "", text=problem, paper=paper, jobs=planned.jobs)
        found[seed] = value
    scale = planned.column.scale
    values = [value.value * scale for value in found.values()]
    return Cell(
        value=sum(values) / len(values),
        error=_error(list(found.values()), scale),
        seeds={
            seed: {"value": value.value * scale, "error": None if value.error is None else value.error * scale}
            for seed, value in found.items()
        },
        items=next(iter(found.values())).items,
        paper=paper,
        jobs=planned.jobs,
    )


def _pick(outcome: Outcome, column: Column) -> tuple[Value | None, str]:
    """The value a column shows, or why there is none; a measure that has none, or not this one here, is no failure."""
    values = outcome.values
    if not values or column.metric in outcome.absent:
        return None, ""
    if column.metric is None:
        if len(values) == 1:
            return next(iter(values.values())), ""
        return None, f"the column names no metric; there are {', '.join(values)}"
    if column.metric not in values:
        return None, f"there is no metric {column.metric}, only {', '.join(values)}"
    return values[column.metric], ""


def _error(found: Sequence[Value], scale: float) -> float | None:
    """Standard error over items of a mean over seeds.

    Seeds answer the same items, so items are averaged over seeds first; where scores of items are not known, seeds are
    taken as independent.
    """
    scores = [value.scores for value in found if value.scores is not None]
    if len(scores) == len(found) and len({len(one) for one in scores}) == 1 and len(scores[0]) > 1:
        return scale * (standard_error([sum(one) / len(one) for one in zip(*scores, strict=True)]) or 0.0)
    errors = [value.error for value in found if value.error is not None]
    if len(errors) < len(found):
        return None
    return scale * math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _average(members: Sequence[Cell], column: Column, paper: float | str | None) -> Cell:
    """Mean of cells; tasks are taken as independent."""
    broken = next((cell for cell in members if cell.value is None), None)
    if broken is not None:
        return Cell(reason=broken.reason, text=broken.text, paper=paper)
    values = [cell.value * column.scale for cell in members if cell.value is not None]
    errors = [cell.error for cell in members if cell.error is not None]
    error = column.scale * math.sqrt(sum(e**2 for e in errors)) / len(errors) if len(errors) == len(values) else None
    seeds = {
        seed: {"value": sum(cell.seeds[seed]["value"] for cell in members) / len(members) * column.scale, "error": None}
        for seed in members[0].seeds
    }
    jobs = tuple(dict.fromkeys(key for cell in members for key in cell.jobs))
    return Cell(sum(values) / len(values), error, seeds, paper=paper, jobs=jobs)
