"""The demo's table, report and numbers."""

from __future__ import annotations

from typing import Any

from l2d_framework.demo.findings import Results, findings, way
from l2d_framework.demo.measure import ADAPTIVE
from l2d_framework.demo.runs import Data
from l2d_framework.demo.scores import Outcome, Sheet, score
from l2d_framework.demo.task import NEW, OLD

COLUMNS = ("model", "solver", "evaluations", f"{NEW} (new)", f"{len(OLD)} old skills")

_NAMES = {"base": "base model", "lora": "LoRA", "l2d": "L2D"}


def table(results: Results) -> list[tuple[str, ...]]:
    """Rows of the table with the columns `COLUMNS`.

    Args:
        results: what was measured.

    Returns:
        One row per outcome.
    """
    return [
        (
            _NAMES[outcome.model],
            outcome.solver or "-",
            _evaluations(outcome),
            str(score(outcome.new.marks)),
            str(score(outcome.old.marks)),
        )
        for outcome in results.outcomes
    ]


def markdown(results: Results, data: Data, commands: list[str]) -> str:
    """The report.

    Args:
        results: what was measured.
        data: the questions.
        commands: what to try next.

    Returns:
        Markdown that shows the pictures beside it.
    """
    rows = [COLUMNS, ("---",) * len(COLUMNS), *table(results)]
    lines = [
        "# A tiny language model becomes a diffusion language model",
        "",
        _introduction(results, data),
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "## What this says",
        "",
        *(f"- {finding}" for finding in findings(results)),
        "",
        "![exact match against evaluations](accuracy_vs_steps.png)",
        "",
        "![answers taking shape](denoising.png)",
        "",
        "## By skill",
        "",
        *_by_skill(results),
        "",
        "## Go on",
        "",
        "```",
        *commands,
        "```",
        "",
    ]
    return "\n".join(lines)


def to_json(results: Results) -> dict[str, Any]:
    """All numbers.

    Args:
        results: what was measured.

    Returns:
        A JSON-ready dictionary.
    """
    return {
        "outcomes": [
            {
                "model": outcome.model,
                "solver": outcome.solver,
                "evaluations": {
                    "mean": outcome.evaluations,
                    "min": min(outcome.new.evaluations),
                    "max": max(outcome.new.evaluations),
                },
                "new": _numbers(outcome.new),
                "old": _numbers(outcome.old),
                "by_skill": {name: _numbers(_only(outcome, name)) for name in (NEW, *OLD)},
            }
            for outcome in results.outcomes
        ],
        "findings": findings(results),
        "denoisings": [
            {
                "chosen": one.chosen,
                "prompt": one.question.prompt,
                "completion": one.question.completion,
                "times": one.times,
                "tokens": one.tokens,
                "probabilities": one.probabilities,
            }
            for one in results.denoisings
        ],
        "stages": {
            name: {"seconds": card["seconds"], **card["parameters"], "updates": card["result"]["steps"]}
            for name, card in results.cards.items()
        },
    }


def _introduction(results: Results, data: Data) -> str:
    example, updates = data.held_out_new[0], {name: card["result"]["steps"] for name, card in results.cards.items()}
    return (
        f"The task: `{example.prompt}` is to be continued with `{example.completion.strip()}`. The base model was "
        f"trained from nothing for {updates['base']:,} updates on {len(data.base):,} questions that seldom ask for the "
        f"{NEW}; LoRA and L2D then saw only {NEW}s, for {updates['l2d']:,} updates each. Exact match is measured on "
        f"{len(data.held_out_new):,} held-out questions about the {NEW} and {len(data.held_out_old):,} about "
        f"{', '.join(OLD)}. Standard errors are over questions; each model was trained once, so what another seed "
        "would change is not in them. An evaluation is one pass of L2D's network for one answer; the last one reads it "
        "out. The demo shows how the parts work together and what is traded for what, not what large models gain."
    )


def _by_skill(results: Results) -> list[str]:
    shown = [results.base, results.lora, results.one, results.default]
    heads = ["base model", "LoRA", "L2D, 1 evaluation", f"L2D, {way(results.default)}"]
    lines = [f"| skill | {' | '.join(heads)} |", f"|{' --- |' * (len(heads) + 1)}"]
    for name in (NEW, *OLD):
        scores = [str(score(_only(outcome, name).marks)) for outcome in shown]
        lines.append(f"| {name} | {' | '.join(scores)} |")
    return lines


def _only(outcome: Outcome, operation: str) -> Sheet:
    sheet = outcome.new if operation == NEW else outcome.old
    rows = zip(sheet.questions, sheet.answers, sheet.evaluations, strict=True)
    questions, answers, evaluations = zip(*(row for row in rows if row[0].operation == operation), strict=True)
    return Sheet(list(questions), list(answers), list(evaluations))


def _numbers(sheet: Sheet) -> dict[str, float]:
    found = score(sheet.marks)
    return {"exact_match": found.mean, "standard_error": found.error, "questions": len(sheet.questions)}


def _evaluations(outcome: Outcome) -> str:
    if outcome.model != "l2d":
        return "-"
    return f"{outcome.evaluations:.1f} (mean)" if outcome.solver == ADAPTIVE else f"{outcome.evaluations:.0f}"
