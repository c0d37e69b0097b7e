"""Data that a profile makes before it trains; a new kind is a class here and a line in `kinds.MAKERS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from l2d_bench.files import code_of
from l2d_framework.config.sections import Section


class Maker(Section, ABC):
    """Makes files in a folder; run files name them as `data:KEY/file`."""

    kind: str
    sources: ClassVar[tuple[str, ...]] = ()
    """Modules beside the maker's own whose code decides what is made."""

    def code(self) -> str:
        """Fingerprint of the code that makes the files: other code may make others.

        Returns:
            A hash.
        """
        return code_of(type(self).__module__, *self.sources)

    def missing(self) -> str | None:
        """Look for what is needed before anything is made.

        Returns:
            What is missing; None if nothing is.
        """
        return None

    @abstractmethod
    def make(self, folder: Path) -> None:
        """Write the files; the same fields make the same files.

        Args:
            folder: exists and is empty.
        """


def missing_data(*names: str) -> str | None:
    """Look for data sets.

    Args:
        *names: of them, as on the hub.

    Returns:
        The first that is not there, in words; None if all are.
    """
    from l2d_framework.evaluation.hub import is_reachable

    return next((f"data set {name} cannot be reached" for name in names if not is_reachable(name, "dataset")), None)


class DemoQuestions(Maker):
    """Questions of `l2d demo`, none twice.

    `base.jsonl` and `new.jsonl` are to train on, `held_out_new.jsonl` and `held_out_old.jsonl` to measure with.
    """

    kind: Literal["demo"] = "demo"
    sources = ("l2d_framework.demo.task",)
    seed: int = 0
    base_questions: int = Field(default=40_000, gt=0)
    new_questions: int = Field(default=30_000, gt=0)
    answers: int = Field(default=2000, gt=0)

    def make(self, folder: Path) -> None:
        """Write the four files.

        Args:
            folder: exists and is empty.
        """
        from l2d_framework.demo.task import make_data, write_questions

        data = make_data(self.seed, base=self.base_questions, new=self.new_questions, answers=self.answers)
        for name, questions in data._asdict().items():
            write_questions(folder / f"{name}.jsonl", questions)
