"""What the demo measured, in words, as a table and as JSON; every statement is computed from the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from l2d_framework.demo.measure import ADAPTIVE, DEFAULT, FIXED, Denoising
from l2d_framework.demo.runs import Data
from l2d_framework.demo.scores import Outcome, Score, Sheet, difference, score
from l2d_framework.demo.task import NEW, OLD

COLUMNS = ("model", "solver", "evaluations", f"new skill: {NEW}", f"the {len(OLD)} old skills")

_NAMES = {"base": "base model", "lora": "LoRA finetuning", "l2d": "L2D"}


@dataclass(frozen=True)
class Results:
    """Everything the demo measured.

    Attributes:
        outcomes: in the order of `Measurement.outcomes`.
        denoising: one answer taking shape.
        cards: `run.json` of each stage by name.
    """

    outcomes: list[Outcome]
    denoising: Denoising
    cards: dict[str, dict[str, Any]]

    @property
    def base(self) -> Outcome:
        """The base model."""
        return self.outcomes[0]

    @property
    def lora(self) -> Outcome:
        """Plain finetuning."""
        return self.outcomes[1]

    @property
    def one(self) -> Outcome:
        """L2D at one evaluation, where no solver has anything to do."""
        return self.outcomes[2]

    @property
    def default(self) -> Outcome:
        """L2D as its preset samples."""
        solver, evaluations = DEFAULT
        return next(outcome for outcome in self.solved(solver) if outcome.evaluations == evaluations)

    def solved(self, solver: str) -> list[Outcome]:
        """L2D with one solver.

        Args:
            solver: its name.

        Returns:
            From the fewest evaluations to the most.
        """
        return [outcome for outcome in self.outcomes if outcome.solver == solver]


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


def findings(results: Results) -> list[str]:
    """What the numbers say; a difference is called one only beyond two standard errors.

    Args:
        results: what was measured.

    Returns:
        One sentence or two each.
    """
    curves = [_curve(results, solver) for solver in FIXED]
    return [
        _identity(results),
        *curves,
        _adaptive(results),
        _against_lora(results),
        _forgetting(results),
        _cost(results),
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
    spent = adaptive.new.evaluations
    gap = difference(default.new.marks, adaptive.new.marks)
    verdict = f"{_more(gap)} exact match than" if gap.is_clear else "no clear difference in exact match from"
    return (
        f"{ADAPTIVE} chooses {adaptive.evaluations:.1f} evaluations a token on average, {min(spent)} to {max(spent)}: "
        f"{verdict} {_way(default)} ({_signed(gap)})."
    )


def _against_lora(results: Results) -> str:
    lora, default = results.lora, results.default
    gap = difference(default.new.marks, lora.new.marks)
    steps = results.cards["lora"]["result"]["steps"]
    both = (
        f"After {steps:,} updates each, LoRA has {score(lora.new.marks)} on the new skill and L2D {_way(default)} has "
    )
    verdict = (
        f"{'LoRA' if gap.mean > 0 else 'L2D'} is better by {_absolute(gap)}" if gap.is_clear else "no clear winner"
    )
    return f"{both}{score(default.new.marks)}: {verdict}."


def _forgetting(results: Results) -> str:
    base, lora, default = results.base.old.marks, results.lora.old.marks, results.default.old.marks
    text = (
        f"On the old skills the base model has {score(base)}, LoRA {score(lora)}, L2D {score(results.one.old.marks)} at 1 "
        f"evaluation and {score(default)} {_way(results.default)}."
    )
    forgets = [name for name, marks in (("LoRA", lora), ("L2D", default)) if _is_worse(difference(base, marks))]
    if not forgets:
        return f"{text} Neither finetuning clearly loses any."
    if "L2D" not in forgets:
        return f"{text} Only LoRA forgets."
    which = "Both forget" if len(forgets) == 2 else "L2D forgets"
    return f"{text} {which}; but with L2D a request for 1 evaluation brings the base model back."


def _cost(results: Results) -> str:
    trained, seconds = (
        {name: results.cards[name][group][key] if group else results.cards[name][key] for name in ("lora", "l2d")}
        for group, key in (("parameters", "trainable"), ("", "seconds"))
    )
    draws = results.cards["l2d"]["config"]["training"]["draws_per_token"]
    return (
        f"LoRA trained {trained['lora']:,} parameters in {seconds['lora']:.0f} s, L2D {trained['l2d']:,} in "
        f"{seconds['l2d']:.0f} s with {draws} noise draws per token."
    )


def markdown(results: Results, data: Data, commands: list[str]) -> str:
    """The report.

    Args:
        results: what was measured.
        data: the questions.
        commands: what to try next.

    Returns:
        Markdown that shows the pictures beside it.
    """
    example, steps = data.held_out_new[0], {name: card["result"]["steps"] for name, card in results.cards.items()}
    rows = [COLUMNS, ("---",) * len(COLUMNS), *table(results)]
    lines = [
        "# A tiny language model becomes a diffusion language model",
        "",
        f"The task: `{example.prompt}` is to be continued with `{example.completion.strip()}`. The base model was trained from "
        f"nothing for {steps['base']:,} updates on {len(data.base):,} questions that seldom ask for the {NEW}; LoRA and L2D "
        f"then saw only {NEW}s, for {steps['l2d']:,} updates each. Exact match below is on {len(data.held_out_new):,} held-out "
        f"questions about the {NEW} and {len(data.held_out_old):,} about {', '.join(OLD)}. It is given with standard errors "
        "over questions: one training run each, so what another seed would change is not in them. Evaluations are passes "
        "through the network per answer, the last one reads the answer out.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "## What this says",
        "",
        *(f"- {finding}" for finding in findings(results)),
        "",
        "![exact match against evaluations](accuracy_vs_steps.png)",
        "",
        "![one answer taking shape](denoising.png)",
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
    denoising = results.denoising
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
        "denoising": {
            "prompt": denoising.question.prompt,
            "completion": denoising.question.completion,
            "times": denoising.times,
            "probabilities": dict(zip(denoising.tokens, denoising.probabilities, strict=True)),
        },
        "stages": {
            name: {"seconds": card["seconds"], **card["parameters"], "updates": card["result"]["steps"]}
            for name, card in results.cards.items()
        },
    }


def _by_skill(results: Results) -> list[str]:
    shown = [results.base, results.lora, results.one, results.default]
    heads = ["base", "LoRA", "L2D, 1 evaluation", f"L2D, {_way(results.default)}"]
    lines = [f"| skill | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
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
    return f"{outcome.evaluations:.1f} on average" if outcome.solver == ADAPTIVE else f"{outcome.evaluations:.0f}"


def _way(outcome: Outcome) -> str:
    return f"with {outcome.solver} at {outcome.evaluations:.0f}"


def _change(gap: Score) -> str:
    if not gap.is_clear:
        return f"does not clearly change ({_signed(gap)})"
    return f"{'rises' if gap.mean > 0 else 'falls'} by {_absolute(gap)}"


def _more(gap: Score) -> str:
    return "higher" if gap.mean > 0 else "lower"


def _is_worse(gap: Score) -> bool:
    return gap.is_clear and gap.mean < 0


def _signed(gap: Score) -> str:
    return f"{gap.mean:+.3f} ± {gap.error:.3f}"


def _absolute(gap: Score) -> str:
    return str(Score(abs(gap.mean), gap.error))
