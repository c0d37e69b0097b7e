"""A benchmark in its folder: tables planned together, run once, written as Markdown, JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2d_bench.cells import Filled, fill
from l2d_bench.files import read_profile
from l2d_bench.jobs import DataJob, Job, ModelJob
from l2d_bench.plan import Plan, make_plan
from l2d_bench.plots import draw
from l2d_bench.pool import unfinished
from l2d_bench.report import markdown, to_json
from l2d_bench.resolve import Resolver
from l2d_framework.errors import ConfigError, L2DError
from l2d_framework.evaluation.plots import can_plot
from l2d_framework.writing import write_whole


class Bench:
    """Tables at the size of one profile; continued where they stopped if started in the same folder again.

    Args:
        tables: ids of the tables.
        profile: name or file of the profile.
        out: folder for everything: `data`, `models`, `results` and the tables.
        seeds: in place of the profile's.

    Raises:
        ConfigError: if a table and the profile do not fit together, or an option is wrong.
    """

    def __init__(self, tables: Sequence[str], profile: str, out: Path, *, seeds: Sequence[int] = ()) -> None:
        self.profile = read_profile(profile)
        if seeds:
            self.profile = self.profile.model_copy(update={"seeds": list(dict.fromkeys(seeds))})
        self.out = out
        self._resolver = Resolver(self.profile, out)
        self.plans: list[Plan] = [make_plan(table, self.profile, self._resolver) for table in tables]

    @property
    def device(self) -> str:
        """Where it computes."""
        return self._resolver.device

    @property
    def jobs(self) -> dict[str, Job]:
        """All jobs of all tables, row by row, each after those it needs: one that is cut short has whole rows."""
        return {key: job for plan in self.plans for key, job in plan.jobs.items()}

    def prepare(self) -> None:
        """Make the data and check every run, so that nothing is trained in front of a mistake.

        Raises:
            ConfigError: if a run cannot be trained.
        """
        import torch

        from l2d_framework.config import check_runs
        from l2d_framework.config.parsing import parse_run

        jobs = self.jobs
        pending = unfinished(jobs)
        if pending and self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("The profile has `device: cuda`, but torch finds no GPU. Run it where one is.")
        broken: set[str] = set()
        for key in pending:
            job = jobs[key]
            if broken.intersection(job.needs):
                broken.add(key)
            elif isinstance(job, DataJob) and not all(jobs[need].is_done for need in job.needs):
                broken.add(key)  # made of a model, once that is trained
            elif isinstance(job, DataJob):
                try:
                    job.do(lambda done, total, text: None)
                except Exception:  # tried again, and then reported, among the other jobs
                    broken.add(key)
        waiting = [job for key in pending if isinstance(job := jobs[key], ModelJob) and key not in broken]
        earlier = [job for job in jobs.values() if isinstance(job, ModelJob) and job.is_done]
        try:
            if waiting:
                check_runs([parse_run(job.run) for job in (*earlier, *waiting)])
        except L2DError as error:
            raise ConfigError(f"A model of the profile cannot be trained: {error}") from error

    def fill(self, failures: dict[str, str]) -> list[Filled]:
        """The tables with the numbers there are.

        Args:
            failures: why jobs failed, by key.

        Returns:
            One per table.
        """
        return [fill(plan, self.profile, failures) for plan in self.plans]

    def write(self, filled: Filled, surroundings: dict[str, Any]) -> list[Path]:
        """Write a table as Markdown and JSON, and its picture where the paper has a figure.

        Args:
            filled: the table.
            surroundings: facts about this run, such as versions and machine.

        Returns:
            The files.
        """
        name = filled.plan.id
        files = [self.out / f"{name}.json", self.out / f"{name}.md"]
        picture = self.out / f"{name}.png"
        found = to_json(filled, self.profile, surroundings)
        self.out.mkdir(parents=True, exist_ok=True)
        # The numbers first, should the picture fail.
        write_whole(files[0], json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write_whole(files[1], markdown(filled, self.profile, []))
        if filled.plan.table.figure is not None and can_plot() and draw(filled, self.profile, picture):
            write_whole(files[1], markdown(filled, self.profile, [picture.name]))
            files.append(picture)
        return files
