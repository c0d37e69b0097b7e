"""Processes of their own for tests: forked from one that has paid for the imports, once per worker of the suite."""

import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Self

CONTEXT = multiprocessing.get_context("forkserver")
# Not from the process of the tests: torch computes no gradients in a fork of one that has computed some.
CONTEXT.set_forkserver_preload(
    [
        "datasets",
        "l2d_plugins.backbones",
        "l2d_plugins.presets",
        "l2d_framework.cli.train",
        "l2d_framework.training.run",
        "transformers.models.llama.modeling_llama",
    ]
)


class Fork:
    """Runs a program as `python -W ignore -c PROGRAM ARGUMENTS` does; left, it is killed.

    Attributes:
        process: it, as multiprocessing knows it.
    """

    def __init__(self, folder: Path, program: str, *arguments: object, **environ: str) -> None:
        self._files = [Path(tempfile.mkdtemp(dir=folder)) / name for name in ("stdout", "stderr")]
        given = (program, [*map(str, arguments)], {**os.environ, **environ}, Path.cwd(), self._files)
        self.process = CONTEXT.Process(target=_run, args=given)
        self.process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.kill()
        self.process.join()

    def printed(self) -> tuple[str, str]:
        """What it has written to standard output and standard error."""
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        return out, err

    def prints(self, text: str) -> None:
        """Wait until it has printed something."""
        while text not in self.printed()[0]:
            assert self.process.is_alive(), self.printed()
            time.sleep(0.01)

    def ended(self, timeout: float = 250.0) -> int:
        """Wait until it has ended; returns its exit code, a negative one if by a signal."""
        self.process.join(timeout)
        code = self.process.exitcode
        assert code is not None, f"It has not ended within {timeout:g} s: {self.printed()}"
        return code


def _run(program: str, arguments: list[str], environ: dict[str, str], folder: Path, files: list[Path]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    for number, file in enumerate(files, 1):
        with file.open("wb") as stream:
            os.dup2(stream.fileno(), number)
    warnings.simplefilter("ignore")
    sys.argv = ["-c", *arguments]
    exec(compile(program, "-c", "exec"), {"__name__": "__main__"})
