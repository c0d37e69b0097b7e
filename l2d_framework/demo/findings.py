"""What the demo measured, in words; every statement is computed from the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from l2d_framework.demo.measure import ADAPTIVE, DEFAULT, FIXED, Denoising
from l2d_framework.demo.scores import Outcome, Score, difference, score


@dataclass(frozen=True)
class Results:
    """Everything the demo measured.

    Attributes:
        outcomes: in the order of `Measurement.outcomes`.
        denoisings: answers taking shape.
        cards: `run.json` of each stage by name.
    """

    outcomes: list[Outcome]
    denoisings: list[Denoising]
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
    verdict = (
        f"exact match is {'higher' if gap.mean > 0 else 'lower'} than" if gap.is_clear else "no clear difference from"
    )
    return (
        f"{ADAPTIVE} chooses {adaptive.evaluations:.1f} evaluations a token on average, from {min(spent)} to "
        f"{max(spent)}: {verdict} {way(default)} ({_signed(gap)})."
    )


def _against_lora(results: Results) -> str:
    lora, default = results.lora, results.default
    gap = difference(default.new.marks, lora.new.marks)
    steps = results.cards["lora"]["result"]["steps"]
    better = "LoRA" if gap.mean > 0 else "L2D"
    verdict = f"{better} is better by {_absolute(gap)}" if gap.is_clear else f"no clear winner ({_signed(gap)})"
    return (
        f"After {steps:,} updates each, LoRA has {score(lora.new.marks)} on the new skill and L2D "
        f"{score(default.new.marks)} with {way(default)}: {verdict}."
    )


def _forgetting(results: Results) -> str:
    base, lora, default = results.base.old.marks, results.lora.old.marks, results.default.old.marks
    text = (
        f"On the old skills the base model has {score(base)}, LoRA {score(lora)}, L2D {score(results.one.old.marks)} "
        f"at 1 evaluation and {score(default)} with {way(results.default)}."
    )
    forgets = [name for name, marks in (("LoRA", lora), ("L2D", default)) if _is_worse(difference(base, marks))]
    who = " and ".join(forgets) or "Neither"
    verb = "forget" if len(forgets) == 2 else "forgets"
    back = "; with L2D, a request for 1 evaluation brings the base model back" if "L2D" in forgets else ""
    return f"{text} {who} {verb}{back}."


def _cost(results: Results) -> str:
    lora, l2d = results.cards["lora"], results.cards["l2d"]
    draws = l2d["config"]["training"]["draws_per_token"]
    return (
        f"LoRA trained {lora['parameters']['trainable']:,} parameters in {lora['seconds']:.0f} s, L2D "
        f"{l2d['parameters']['trainable']:,} in {l2d['seconds']:.0f} s with {draws} noise draws per token."
    )


def way(outcome: Outcome) -> str:
    """How L2D answered.

    Args:
        outcome: with a solver.

    Returns:
        Solver and evaluations.
    """
    return f"{outcome.solver} at {outcome.evaluations:.0f}"


def _change(gap: Score) -> str:
    if not gap.is_clear:
        return f"does not clearly change ({_signed(gap)})"
    return f"{'rises' if gap.mean > 0 else 'falls'} by {_absolute(gap)}"


def _is_worse(gap: Score) -> bool:
    return gap.is_clear and gap.mean < 0


def _signed(gap: Score) -> str:
    return f"{gap.mean:+.3f} ± {gap.error:.3f}"


def _absolute(gap: Score) -> str:
    return str(Score(abs(gap.mean), gap.error))
