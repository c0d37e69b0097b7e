"""Pieces of work: data made, models trained, measures taken; each is named by its contents and done once."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2d_bench.data.makers import Maker
from l2d_bench.kinds import KINDS, MAKERS
from l2d_bench.measures.base import Measure, Subject
from l2d_framework.writing import write_whole

Report = Callable[[int, int, str], None]
"""Told how much of how much is done, and a few words."""


def digest(content: Any) -> str:
    """Name of a content.

    Args:
        content: JSON-ready.

    Returns:
        Twelve hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Job(ABC):
    """A piece of work.

    Attributes:
        key: names it and its result.
        title: what is shown of it.
        output: the folder or file that it writes, complete or not at all.
        needs: keys of jobs that come before.
    """

    key: str
    title: str
    output: Path
    needs: tuple[str, ...]

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether the result is there."""

    @abstractmethod
    def do(self, report: Report) -> None:
        """Do it.

        Args:
            report: progress.
        """


@dataclass(frozen=True)
class DataJob(Job):
    """Data to be made by the maker that `section` describes."""

    section: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether the folder is there."""
        return self.output.is_dir()

    def do(self, report: Report) -> None:
        """Make the files.

        Args:
            report: progress.
        """
        from l2d_framework.writing import staged

        self.output.parent.mkdir(parents=True, exist_ok=True)
        with staged(self.output) as folder:
            make_maker(self.section).make(folder)


@dataclass(frozen=True)
class ModelJob(Job):
    """A run to be trained; `run` holds its fields."""

    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether its card says so."""
        from l2d_framework.training.output_dir import read_card

        card = read_card(self.output)
        return card is not None and bool(card["finished"])

    def do(self, report: Report) -> None:
        """Train, going on where an earlier start was interrupted.

        Args:
            report: progress.
        """
        from l2d_bench.watching import Watcher
        from l2d_framework.config import RewardRun
        from l2d_framework.config.parsing import parse_run
        from l2d_framework.training.reward.run import train_reward
        from l2d_framework.training.run import train_runs

        run = parse_run(self.run)
        if isinstance(run, RewardRun):
            train_reward(run, callbacks=[Watcher(report)])
        else:
            train_runs([run], callbacks=lambda _: [Watcher(report)])


@dataclass(frozen=True)
class MeasureJob(Job):
    """A measure to be taken of a model; what it finds is written as JSON."""

    measure: Mapping[str, Any] = field(default_factory=dict)
    subject: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether the file is there."""
        return self.output.is_file()

    def do(self, report: Report) -> None:
        """Measure.

        Args:
            report: progress.
        """
        from l2d_bench.files import commit
        from l2d_framework.training.output_dir import read_card
        from l2d_framework.training.run_record import environment

        began = time.perf_counter()
        path = Path(str(self.subject["path"]))
        card = read_card(path) if path.is_dir() else None
        outcome = make_measure(self.measure).run(Subject(**self.subject, card=card))
        record = {
            "job": self.title,
            **self.identity,
            "outcome": outcome.model_dump(mode="json"),
            "seconds": time.perf_counter() - began,
            **environment(1),
            "commit": commit(),
        }
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.output, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def make_maker(section: Mapping[str, Any]) -> Maker:
    """Maker of a profile's section.

    Args:
        section: `kind` and the fields of its class.

    Returns:
        The maker.
    """
    return MAKERS[str(section["kind"])].model_validate_json(json.dumps(dict(section)))


def make_measure(section: Mapping[str, Any]) -> Measure:
    """Measure of a profile's section.

    Args:
        section: `kind` and the fields of its class.

    Returns:
        The measure.
    """
    return KINDS[str(section["kind"])].model_validate_json(json.dumps(dict(section)))
