"""Questions of the tiny L2D tables: those of the demo, and expressions from solutions of GSM8K."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from l2d_bench.data.makers import Maker, missing_data
from l2d_bench.data.rows import Row, write_rows
from l2d_bench.data.tess_data import TessTexts
from l2d_framework.demo.task import Data, Question, make_data

if TYPE_CHECKING:
    import datasets

_FEW_MEDIANS, _FEW_EXPRESSIONS = 4_000, 3_000
"""Training questions that the base model sees beside the demo's; finetuning sees more of both."""
_MORE_EXPRESSIONS = 9_000
_EXPRESSION, _NUMBERS = "math", "general"


class L2DQuestions(Maker):
    """Questions for a base model and for finetuning it.

    `base.jsonl` holds the demo's old skills, some medians and some expressions, `new.jsonl` medians and expressions;
    each row has `prompt`, `completion` and `class`. Needs the data set `implicit_cot/gsm8k_equations`.
    """

    kind: Literal["l2d_questions"] = "l2d_questions"
    sources = ("l2d_framework.demo.task", "l2d_bench.data.tess_data")

    def missing(self) -> str | None:
        """Look for the data set.

        Returns:
            What is missing; None if it is there.
        """
        return missing_data("implicit_cot/gsm8k_equations")

    def make(self, folder: Path) -> None:
        """Write both files.

        Args:
            folder: exists and is empty.
        """
        data = _questions()
        expressions = [{**row, "class": _EXPRESSION} for row in TessTexts().equations().train]
        few = [*map(_row, data.new[:_FEW_MEDIANS]), *expressions[:_FEW_EXPRESSIONS]]
        write_rows(folder / "base.jsonl", [*map(_row, data.base), *few])
        write_rows(folder / "new.jsonl", [*map(_row, data.new), *expressions[:_MORE_EXPRESSIONS]])


@cache
def held_out() -> dict[str, list[Row]]:
    """Questions that no training file holds; the settings of the profile were tried out on those of another seed.

    Returns:
        500 of each: `median`, `other_skills` (the demo's five old ones), `expressions`.
    """
    data = _questions()
    return {
        "median": list(map(_row, data.held_out_new)),
        "other_skills": list(map(_row, data.held_out_old)),
        "expressions": TessTexts().equations().held_out,
    }


def task_data(questions: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """What the task files of `bench/tasks/tiny` ask.

    Args:
        questions: a key of `held_out`.
        **metadata: further metadata of the task.

    Returns:
        A split `test` with `prompt` and `completion`.
    """
    import datasets

    return {"test": datasets.Dataset.from_list(held_out()[questions])}


@cache
def _questions() -> Data:
    """Those to train on and those held out come from one source, so that they share none."""
    return make_data(1, base=40_000, new=24_000, answers=500)


def _row(question: Question) -> Row:
    return {"prompt": question.prompt, "completion": question.completion, "class": _NUMBERS}
