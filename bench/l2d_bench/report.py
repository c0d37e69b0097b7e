"""A table with its numbers as rows of text, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from l2d_bench.cells import FAILED, Cell, Filled
from l2d_bench.files import paper_numbers
from l2d_bench.plan import NO_DATA, NOT_RERUN
from l2d_bench.schema import Column, ProfileFile
from l2d_framework.evaluation import tables

LEGEND = (
    "Mean over the seeds ± standard error over items (of each item's mean over the seeds where its scores are known); "
    "in brackets what the paper prints."
)


def rows(filled: Filled, profile: ProfileFile) -> list[list[str]]:
    """The table as text.

    Args:
        filled: the table.
        profile: the profile.

    Returns:
        A row of headings, then the rows.
    """
    plan = filled.plan
    names = plan.table.paper_columns
    heading = ["", *(_heading(names.get(name, name), profile.columns[name]) for name in plan.columns)]
    body = [
        [row.label, *(shown(filled.cells[number, name], profile.columns[name]) for name in plan.columns)]
        for number, row in enumerate(plan.rows)
    ]
    return [heading, *body]


def shown(cell: Cell, column: Column) -> str:
    """Text of a cell.

    Args:
        cell: the cell.
        column: its column.

    Returns:
        Such as `38.2 ± 1.3 (38.86)`, `no data (3.6)` or `failed: why`.
    """
    paper = "" if cell.paper is None else f" ({cell.paper})"
    if cell.value is None:
        if cell.reason == FAILED:
            return f"failed: {_short(cell.text)}{paper}"
        return f"{cell.reason or ''}{paper}".strip() or "-"
    error = "" if cell.error is None else f" ± {cell.error:.{column.digits}f}"
    return f"{cell.value:,.{column.digits}f}{error}{paper}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"


def _heading(name: str, column: Column) -> str:
    return name if column.label is None else f"{name}: {column.label}"


def notes(filled: Filled, profile: ProfileFile) -> list[str]:
    """What a reader has to know beside the numbers.

    Args:
        filled: the table.
        profile: the profile.

    Returns:
        Sentences: the table's note, why data are missing, what failed.
    """
    plan = filled.plan
    found = [LEGEND, f"Profile: {profile.title}. Seeds: {', '.join(map(str, profile.seeds))}."]
    found += [plan.table.note] if plan.table.note else []
    for name in plan.columns:
        items = sorted({cell.items for (_, column), cell in filled.cells.items() if column == name and cell.items})
        if items and items != [1]:
            found.append(f"{name}: {' or '.join(f'{count:,}' for count in items)} items.")
    for reason in (NO_DATA, NOT_RERUN, FAILED):
        why: dict[str, list[str]] = {}
        for (number, name), cell in filled.cells.items():
            if cell.reason == reason and name in plan.columns and cell.text:
                why.setdefault(cell.text, []).append(f"{plan.rows[number].label} / {name}")
        found += [f"{reason}, {_places(places)}: {text}" for text, places in why.items()]
    return found


def _places(places: Sequence[str]) -> str:
    return "; ".join(places) if len(places) <= 3 else f"{'; '.join(places[:2])} and {len(places) - 2} others"


def markdown(filled: Filled, profile: ProfileFile, pictures: Sequence[str]) -> str:
    """The report.

    Args:
        filled: the table.
        profile: the profile.
        pictures: file names of pictures beside it.

    Returns:
        Markdown.
    """
    table = filled.plan.table
    lines = [
        f"# {table.title}",
        "",
        f"{table.reference}; `l2d bench {filled.plan.id}`.",
        "",
        *tables.markdown(rows(filled, profile)),
        "",
        *(f"* {note}" for note in notes(filled, profile)),
        "",
        *(line for name in pictures for line in (f"![{table.title}]({name})", "")),
        *_seeds(filled, profile),
        *(line for title, table in printed(filled) for line in _section(f"The paper prints: {title}", table)),
        *_texts(filled),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _seeds(filled: Filled, profile: ProfileFile) -> list[str]:
    """Each seed's numbers, since two runs of one row show what a standard error over items leaves out."""
    if len(profile.seeds) < 2:
        return []
    plan = filled.plan
    body = []
    for number, row in enumerate(plan.rows):
        cells = [filled.cells[number, name] for name in plan.columns]
        if any(len(cell.seeds) > 1 for cell in cells):
            digits = [profile.columns[name].digits for name in plan.columns]
            texts = [
                " / ".join(f"{one['value']:,.{places}f}" for one in cell.seeds.values())
                + (f" (± {cell.spread:,.{places}f})" if cell.spread else "")
                for cell, places in zip(cells, digits, strict=True)
            ]
            body.append([row.label, *texts])
    if not body:
        return []
    return _section("By seed, ± standard error over seeds", [["", *plan.columns], *body])


def _section(title: str, table: Sequence[Sequence[str]]) -> list[str]:
    return [f"## {title}", "", *tables.markdown(table), ""]


def printed(filled: Filled) -> list[tuple[str, list[list[str]]]]:
    """The paper's own tables, where a profile measures other columns than theirs.

    Args:
        filled: the table.

    Returns:
        Title and rows of each, headings first; none whose numbers all stand beside the measured ones.
    """
    plan, found = filled.plan, []
    names = {plan.table.paper_columns.get(name, name) for name in plan.columns}
    for key in plan.table.paper:
        theirs = paper_numbers()[key]
        across = [row["row"] for row in theirs["rows"]] if plan.table.transposed else theirs["columns"]
        if not set(across) <= names:
            body = [[row["row"], *("" if v is None else str(v) for v in row["values"])] for row in theirs["rows"]]
            found.append((theirs["title"], [["", *theirs["columns"]], *body]))
    return found


def _texts(filled: Filled) -> list[str]:
    """Generations side by side, one column per row of the table."""
    shown: dict[str, list[dict[str, str]]] = {}
    for (number, _), cell in filled.cells.items():
        for key in cell.jobs[:1]:
            if key in filled.outcomes and filled.outcomes[key].texts:
                shown.setdefault(filled.plan.rows[number].label, filled.outcomes[key].texts)
    if not shown:
        return []
    lines = ["## Samples", ""]
    for index in range(max(len(texts) for texts in shown.values())):
        prompt = next(texts[index]["prompt"] for texts in shown.values() if index < len(texts))
        lines += [f"### {index + 1}", "", *(f"> {line}" for line in prompt.splitlines() or [""]), ""]
        texts = [_inline(found[index]["text"]) if index < len(found) else "" for found in shown.values()]
        lines += [*tables.markdown([list(shown), texts]), ""]
    return lines


def _inline(text: str) -> str:
    return text.strip().replace("<", "&lt;").replace("\n", "<br>")


def to_json(filled: Filled, profile: ProfileFile, surroundings: dict[str, Any]) -> dict[str, Any]:
    """All numbers.

    Args:
        filled: the table.
        profile: the profile.
        surroundings: facts about this run, such as versions and machine.

    Returns:
        A JSON-ready dictionary; curves, matrices, texts and scores of items stay in the files of the results.
    """
    plan = filled.plan
    return {
        "table": plan.id,
        "title": plan.table.title,
        "reference": plan.table.reference,
        "profile": profile.title,
        "seeds": profile.seeds,
        "notes": notes(filled, profile),
        "columns": plan.columns,
        "rows": [
            {
                "label": row.label,
                "model": row.model,
                "options": row.options,
                "column_options": row.column_options,
                "series": row.series,
                "x": row.x,
                "cells": {name: _cell(filled.cells[number, name], profile.columns[name]) for name in plan.columns},
            }
            for number, row in enumerate(plan.rows)
        ],
        "results": {
            key: {
                "seconds": record["seconds"],
                "details": _brief(record["outcome"]["details"]),
                **{name: record[name] for name in ("commit", "hardware") if name in record},
            }
            for key, record in filled.records.items()
        },
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        **surroundings,
    }


def _cell(cell: Cell, column: Column) -> dict[str, Any]:
    return {
        "value": cell.value,
        "standard_error_over_items": cell.error,
        "standard_error_over_seeds": cell.spread,
        "by_seed": {str(seed): one for seed, one in cell.seeds.items()},
        "items": cell.items,
        "paper": cell.paper,
        "reason": cell.reason,
        "text": cell.text or None,
        "measured": column.label,
        "results": list(cell.jobs),
    }


def _brief(details: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in details.items() if not isinstance(value, (dict, list))}
