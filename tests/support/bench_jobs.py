"""Jobs for tests of the benchmark's processes, which import them by name."""

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from l2d_bench.jobs import Job


@dataclass(frozen=True)
class Touch(Job):
    """Makes an empty file, or ends its process with a code."""

    code: int | None = None

    @property
    def is_done(self) -> bool:
        return self.output.is_file()

    def do(self, report: Any) -> None:
        if self.code is not None:
            os._exit(self.code)
        self.output.touch()


@dataclass(frozen=True)
class Save(Job):
    """Works on until it is asked to end, and then takes a while to save what it has."""

    @property
    def is_done(self) -> bool:
        return False

    def do(self, report: Any) -> None:
        def save(*_: object) -> None:
            time.sleep(1.0)
            self.output.touch()
            os._exit(0)

        signal.signal(signal.SIGTERM, save)
        self.output.with_suffix(".began").touch()
        time.sleep(60)
