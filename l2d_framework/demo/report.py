"""What the demo measured: findings in words, each computed from the answers, a table, a report, and all numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from l2d_framework.demo.measure import (
    ADAPTIVE,
    FIXED,
    Denoising,
    Milestone,
    Outcome,
    Sheet,
    difference,
    in_default_way,
)
from l2d_framework.demo.task import NEW, OLD, Data
from l2d_framework.evaluation import tables
from l2d_framework.evaluation.statistics import Estimate

_NAMES = {"base": "base model", "lora": "LoRA", "l2d": "L2D"}


class Results:
    """Everything the demo measured.

    Args:
        outcomes: in the order of `WAYS`.
        learning: LoRA and L2D from the base model to the end of their training.
        denoisings: answers taking shape.
        cards: `run.json` of each stage.
    """

    def __init__(
        self,
        outcomes: list[Outcome],
        learning: dict[str, list[Milestone]],
        denoisings: list[Denoising],
        cards: dict[str, dict[str, Any]],
    ) -> None:
        self.outcomes, self.learning, self.denoisings, self.cards = outcomes, learning, denoisings, cards
        # At one evaluation no solver has anything to do.
        self.base, self.lora, self.one = outcomes[:3]
        self.default = in_default_way(outcomes)

    def solved(self, solver: str) -> list[Outcome]:
        """L2D with one solver, from the fewest evaluations to the most."""
        return [outcome for outcome in self.outcomes if outcome.solver == solver]


def findings(results: Results) -> list[str]:
    """What the numbers say in a sentence or two each; a difference is one only beyond two standard errors."""
    curves = [_curve(results, solver) for solver in FIXED]
    return [
        _identity(results),
        *curves,
        *(say(results) for say in (_adaptive, _convergence, _against_lora, _forgetting, _cost)),
    ]


def _identity(results: Results) -> str:
    pairs = [(results.base.new, results.one.new), (results.base.old, results.one.old)]
    same = sum(a == b for ours, theirs in pairs for a, b in zip(ours.answers, theirs.answers, strict=True))
    total = sum(len(sheet.answers) for sheet, _ in pairs)
    text = f"At 1 evaluation L2D gives the base model's own answer to {same:,} of {total:,} questions"
    return f"{text}." if same == total else f"{text}, although it should to all: report this as a bug."


def _curve(results: Results, solver: str) -> str:
    few, *_, many = results.solved(solver)
    rise, later = difference(results.one.new.marks, few.new.marks), difference(few.new.marks, many.new.marks)
    return (
        f"With {solver}, exact match on the new skill {_change(rise)} from 1 to {few.evaluations:.0f} evaluations and "
        f"{_change(later)} from {few.evaluations:.0f} to {many.evaluations:.0f}."
    )


def _adaptive(results: Results) -> str:
    (adaptive,), default = results.solved(ADAPTIVE), results.default
    spent, gap = adaptive.new.evaluations, difference(default.new.marks, adaptive.new.marks)
    sign = "higher" if _rises(gap) else "lower"
    verdict = f"exact match is {sign} than" if gap.is_clear else "no clear difference from"
    return (
        f"{ADAPTIVE} chooses {adaptive.evaluations:.1f} evaluations a token on average, from {min(spent)} to "
        f"{max(spent)}: {verdict} {_way(default)} ({_text(gap, '+')})."
    )


def _convergence(results: Results) -> str:
    texts = []
    for name, milestones in results.learning.items():
        before, last = milestones[-2:]
        change = _change(difference(before.new.marks, last.new.marks))
        texts.append(f"that of {_NAMES[name]} {change} from {before.updates:,} to {last.updates:,}")
    return f"Over the last updates exact match on the new skill may still move: {'; '.join(texts)}."


def _against_lora(results: Results) -> str:
    lora, default = results.lora, results.default
    gap = difference(default.new.marks, lora.new.marks)
    better = "LoRA" if _rises(gap) else "L2D"
    verdict = f"{better} is better by {_size(gap)}" if gap.is_clear else f"no clear winner ({_text(gap, '+')})"
    return (
        f"After {results.cards['lora']['result']['steps']:,} updates each, LoRA has {_text(lora.new.score)} on the new "
        f"skill and L2D {_text(default.new.score)} with {_way(default)}: {verdict}."
    )


def _forgetting(results: Results) -> str:
    base, lora, default = results.base.old, results.lora.old, results.default.old
    text = (
        f"On the old skills the base model has {_text(base.score)}, LoRA {_text(lora.score)}, L2D "
        f"{_text(results.one.old.score)} at 1 evaluation and {_text(default.score)} with {_way(results.default)}."
    )
    gaps = {"LoRA": difference(base.marks, lora.marks), "L2D": difference(base.marks, default.marks)}
    forgets = [name for name, gap in gaps.items() if gap.is_clear and not _rises(gap)]
    who, verb = " and ".join(forgets) or "Neither", "forget" if len(forgets) == 2 else "forgets"
    back = "; with L2D, a request for 1 evaluation brings the base model back" if "L2D" in forgets else ""
    return f"{text} {who} {verb}{back}."


def _cost(results: Results) -> str:
    lora, l2d = results.cards["lora"], results.cards["l2d"]
    draws = l2d["config"]["training"]["draws_per_token"]
    return (
        f"LoRA trained {lora['parameters']['trainable']:,} parameters in {lora['seconds']:.0f} s, L2D "
        f"{l2d['parameters']['trainable']:,} in {l2d['seconds']:.0f} s with {draws} noise draws per token."
    )


def _way(outcome: Outcome) -> str:
    return f"{outcome.solver} at {outcome.evaluations:.0f}"


def _change(gap: Estimate) -> str:
    verb = "rises" if _rises(gap) else "falls"
    return f"{verb} by {_size(gap)}" if gap.is_clear else f"does not clearly change ({_text(gap, '+')})"


def _rises(gap: Estimate) -> bool:
    return (gap.value or 0.0) > 0


def _text(number: Estimate, sign: str = "") -> str:
    return f"{number.value:{sign}.3f} ± {number.standard_error:.3f}"


def _size(gap: Estimate) -> str:
    return _text(gap, "+")[1:]


def table(results: Results) -> list[tuple[str, ...]]:
    """Headings, then a row per outcome."""
    rows: list[tuple[str, ...]] = [("model", "solver", "evaluations", f"{NEW} (new)", f"{len(OLD)} old skills")]
    for one in results.outcomes:
        spent = f"{one.evaluations:.1f} (mean)" if one.solver == ADAPTIVE else f"{one.evaluations:.0f}"
        scores = _text(one.new.score), _text(one.old.score)
        rows.append((_NAMES[one.model], one.solver or "-", spent if one.model == "l2d" else "-", *scores))
    return rows


def learning_table(results: Results) -> list[tuple[str, ...]]:
    """Headings, then a row per number of updates: exact match of LoRA and of L2D."""
    headings = (f"{_NAMES[name]}, {skill}" for name in results.learning for skill in (NEW, f"{len(OLD)} old"))
    rows: list[tuple[str, ...]] = [("updates", *headings)]
    for stops in zip(*results.learning.values(), strict=True):
        scores = (_text(sheet.score) for stop in stops for sheet in (stop.new, stop.old))
        rows.append((f"{stops[0].updates:,}", *scores))
    return rows


def markdown(results: Results, data: Data, commands: list[str]) -> str:
    """The report in Markdown, which shows the pictures beside it; `commands` say what to try next."""
    parts = [
        ["# A tiny language model becomes a diffusion language model"],
        [_introduction(results, data)],
        tables.markdown(table(results)),
        [f"While they learn (L2D with {_way(results.default)}):"],
        tables.markdown(learning_table(results)),
        ["## What this says"],
        [f"- {finding}" for finding in findings(results)],
        ["![exact match against evaluations](accuracy_vs_steps.png)"],
        ["![answers taking shape](denoising.png)"],
        ["## By skill"],
        tables.markdown(_by_skill(results)),
        ["## Go on"],
        ["```", *commands, "```"],
    ]
    return "\n".join(line for part in parts for line in (*part, ""))


def to_json(results: Results) -> dict[str, Any]:
    """All numbers, JSON-ready."""
    outcomes = []
    for one in results.outcomes:
        spent = one.new.evaluations
        evaluations = {"mean": one.evaluations, "min": min(spent), "max": max(spent)}
        skills = {name: _numbers(_only(one, name)) for name in (NEW, *OLD)}
        scores = {"new": _numbers(one.new), "old": _numbers(one.old), "by_skill": skills}
        outcomes.append({"model": one.model, "solver": one.solver, "evaluations": evaluations, **scores})
    denoisings = [asdict(denoising) for denoising in results.denoisings]
    stages = {
        name: {"seconds": card["seconds"], **card["parameters"], "updates": card["result"]["steps"]}
        for name, card in results.cards.items()
    }
    learning = {
        name: [{"updates": stop.updates, "new": _numbers(stop.new), "old": _numbers(stop.old)} for stop in milestones]
        for name, milestones in results.learning.items()
    }
    return {
        "outcomes": outcomes,
        "learning": learning,
        "findings": findings(results),
        "denoisings": denoisings,
        "stages": stages,
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


def _by_skill(results: Results) -> list[tuple[str, ...]]:
    shown = [results.base, results.lora, results.one, results.default]
    headings = ("skill", "base model", "LoRA", "L2D, 1 evaluation", f"L2D, {_way(results.default)}")
    return [headings, *((name, *(_text(_only(one, name).score) for one in shown)) for name in (NEW, *OLD))]


def _only(outcome: Outcome, operation: str) -> Sheet:
    sheet = outcome.new if operation == NEW else outcome.old
    rows = zip(sheet.questions, sheet.answers, sheet.evaluations, strict=True)
    questions, answers, evaluations = zip(*(row for row in rows if row[0].operation == operation), strict=True)
    return Sheet(list(questions), list(answers), list(evaluations))


def _numbers(sheet: Sheet) -> dict[str, float | None]:
    score = sheet.score
    return {"exact_match": score.value, "standard_error": score.standard_error, "questions": score.samples}
