"""Jobs for tests of the benchmark's processes, which import them by name."""

import os
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
