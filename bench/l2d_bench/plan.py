"""From a table and a profile to the cells of the table and the jobs that fill them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from l2d_bench.files import read_table
from l2d_bench.jobs import Job
from l2d_bench.resolve import Resolver
from l2d_bench.schema import Column, ProfileFile, Row, RowChange, TableChange, TableFile
from l2d_framework.errors import ConfigError, suggest

NOT_RERUN, NO_DATA, NOT_HERE = "not rerun", "no data", ""
"""Why a cell has no number: printed values only, missing data, not measured in this row."""


@dataclass(frozen=True)
class CellPlan:
    """Where the number of one cell comes from.

    Attributes:
        column: what the profile says of the column; None where it has no number.
        jobs: keys of the measurements, one per seed.
        reason: why there is no number, a constant above.
        text: the reason in words.
    """

    column: Column | None = None
    jobs: tuple[str, ...] = ()
    reason: str | None = None
    text: str = ""


@dataclass
class Plan:
    """A table ready to be run.

    Attributes:
        id: of the table.
        table: what it declares, the profile's changes made.
        rows: its rows, sweeps unfolded.
        columns: names of the columns.
        cells: by number of the row and name of the column.
        jobs: by key, each after those it needs.
    """

    id: str
    table: TableFile
    rows: list[Row]
    columns: list[str]
    cells: dict[tuple[int, str], CellPlan] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)


def make_plan(table_id: str, profile: ProfileFile, resolver: Resolver) -> Plan:
    """Plan of a table.

    Args:
        table_id: of the table.
        profile: the profile.
        resolver: makes the jobs; the same one for several tables, which then share them.

    Returns:
        The plan.

    Raises:
        ConfigError: if table and profile do not fit together: a row, column, model or option is unknown.
    """
    table = read_table(table_id)
    change = profile.tables.get(Path(table_id).stem) or TableChange()
    table = table.model_copy(
        update={
            "note": " ".join(filter(None, (table.note, change.note))) or None,
            "figure": change.figure or table.figure,
        }
    )
    rows = [point for row in _changed(table_id, table, change) for point in _unfolded(row)]
    columns = [*(change.columns or table.columns), *change.extra]
    columns += [name for pattern, extra in profile.extra.items() if fnmatch(table_id, pattern) for name in extra]
    plan = Plan(Path(table_id).stem, table, rows, list(dict.fromkeys(columns)))
    _check_columns(plan, profile)
    for number, row in enumerate(rows):
        # Columns that are averaged are measured whether or not they are shown.
        wanted = _with_members(plan.columns if row.columns is None else row.columns, profile)
        for name in _with_members(plan.columns, profile):
            cell = _cell(row, name, profile, resolver) if name in wanted else CellPlan(reason=NOT_HERE)
            plan.cells[number, name] = cell
            for key in cell.jobs:
                resolver.collect(key, plan.jobs)
    return plan


def _with_members(columns: Sequence[str], profile: ProfileFile) -> list[str]:
    members = [name for column in columns for name in profile.columns[column].mean or ()]
    return list(dict.fromkeys([*columns, *members]))


def _changed(table_id: str, table: TableFile, change: TableChange) -> Iterator[Row]:
    labels = [row.label for row in table.rows]
    for label in change.rows:
        if label not in labels:
            raise ConfigError(f"The profile changes row {label!r} of {table_id}{suggest(label, labels) or '.'} Fix it.")
    for row in table.rows:
        asked: RowChange | None = change.rows.get(row.label)
        given = {} if asked is None else {name: getattr(asked, name) for name in asked.model_fields_set}
        yield row.model_copy(update={**given, "paper_row": row.paper_row or row.label})


def _unfolded(row: Row) -> Iterator[Row]:
    if row.sweep is None:
        yield row
        return
    option = row.sweep.option
    for value in row.sweep.values:
        x = float(value) if isinstance(value, (int, float)) else row.x
        label = f"{row.label}, {option.replace('_', ' ')} {value}"
        changes = {"label": label, "paper_row": label, "options": {**row.options, option: value}}
        yield row.model_copy(update={**changes, "series": row.series or row.label, "x": x, "sweep": None})


def _check_columns(plan: Plan, profile: ProfileFile) -> None:
    known = profile.columns
    named = [
        *plan.columns,
        *(name for row in plan.rows for name in (*(row.columns or ()), *row.column_options, *row.column_models)),
    ]
    named += [member for name in named if name in known for member in known[name].mean or ()]
    for name in named:
        if name not in known:
            raise ConfigError(
                f"Table {plan.id} has a column {name!r} that the profile lacks{suggest(name, known) or '.'} Add it "
                "there, as `no_data: why` where there is nothing to measure."
            )
    for name in (plan.table.figure.columns or ()) if plan.table.figure is not None else ():
        if name not in plan.columns:
            raise ConfigError(
                f"The figure of table {plan.id} shows a column {name!r} that the table lacks"
                f"{suggest(name, plan.columns) or '.'} Its columns are {plan.columns}."
            )
    for name in named:
        if any(known[member].mean for member in known[name].mean or ()):
            raise ConfigError(f"Column {name!r} of the profile averages an average. Name the columns themselves.")


def _cell(row: Row, name: str, profile: ProfileFile, resolver: Resolver) -> CellPlan:
    column = profile.columns[name]
    if row.not_rerun is not None:
        return CellPlan(reason=NOT_RERUN, text=row.not_rerun)
    if column.no_data is not None:
        return CellPlan(reason=NO_DATA, text=column.no_data)
    if column.mean is not None:
        return CellPlan(column)
    missing = resolver.missing(row, name)
    if profile.models[row.column_models.get(name, str(row.model))].no_data is not None:
        return CellPlan(reason=NO_DATA, text=str(missing))
    # Resolved in any case, so that a mistake is found where data are missing, too.
    jobs = tuple(resolver.measure_job(row, name, seed) for seed in profile.seeds)
    # What was measured once stays, also where its data or a consent are missing now.
    if missing is None or all(resolver.jobs[key].is_done for key in jobs):
        return CellPlan(column, jobs)
    return CellPlan(reason=NO_DATA, text=missing)
