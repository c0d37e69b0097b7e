"""The demo from an empty folder to its report."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from l2d_framework.config import Run, load_run
from l2d_framework.demo.findings import Results
from l2d_framework.demo.measure import Measurement
from l2d_framework.demo.plots import ACCURACY, DENOISING, can_plot, draw_accuracy, draw_denoisings
from l2d_framework.demo.report import markdown, to_json
from l2d_framework.demo.runs import L2D, RUN_FILE, Data, Size, data_file, make_data, run_file
from l2d_framework.demo.scores import Outcome
from l2d_framework.demo.task import write_questions
from l2d_framework.errors import ConfigError
from l2d_framework.training.output_dir import read_card

REPORT, NUMBERS = "report.md", "results.json"


class Demo:
    """One demonstration in one folder; continued where it stopped if it is started there again.

    Args:
        folder: for everything it writes.
        size: how much to train and to measure.
        seed: of questions, models and noise.

    Raises:
        ConfigError: if the folder holds something else.
    """

    def __init__(self, folder: Path, size: Size, seed: int) -> None:
        self.folder, self._size, self._seed = folder.absolute(), size, seed
        self._name = folder
        self._text = yaml.safe_dump(run_file(self.folder, size, seed), sort_keys=False)
        path = self.folder / RUN_FILE
        if self.folder.exists() and not (self.folder.is_dir() and (path.is_file() or not any(self.folder.iterdir()))):
            raise ConfigError(
                f"{str(folder)!r} exists and holds no demo. Choose another --out, or use --overwrite, which moves it "
                "aside."
            )
        if path.is_file() and path.read_text(encoding="utf-8") != self._text:
            raise ConfigError(
                f"{str(folder)!r} holds a demo with other settings, such as another seed. Choose another --out, or use "
                "--overwrite, which moves it aside."
            )

    def prepare(self) -> tuple[Data, list[Run]]:
        """Write questions and run file.

        Returns:
            The questions and the runs to train, in order.

        Raises:
            ConfigError: if the folder cannot be written.
        """
        data = make_data(self._size, self._seed)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # First, since it marks the folder as a demo's for whoever comes back to it.
            _write(self.folder / RUN_FILE, self._text)
            for name, questions in data._asdict().items():
                path = data_file(self.folder, name)
                path.parent.mkdir(exist_ok=True)
                write_questions(path, questions)
        except OSError as error:
            raise ConfigError(
                f"{str(self.folder)!r} cannot be written ({error.strerror}). Choose another --out."
            ) from error
        return data, load_run(self.folder / RUN_FILE)

    def results(self, measurement: Measurement, outcomes: list[Outcome]) -> Results:
        """Outcomes with everything else the report needs.

        Args:
            measurement: of this demo.
            outcomes: what it found.

        Returns:
            What was measured.
        """
        stages = [Path(str(stage["output_dir"])) for stage in run_file(self.folder, self._size, self._seed)["stages"]]
        cards = {stage.name: read_card(stage) or {} for stage in stages}
        return Results(outcomes, measurement.denoisings(outcomes), cards)

    def commands(self, data: Data) -> list[str]:
        """What to try next.

        Args:
            data: the questions.

        Returns:
            Command lines, for where the demo was started.
        """
        prompt = data.held_out_new[0].prompt
        program = "l2d" if shutil.which("l2d") else str(Path(sys.executable).with_name("l2d"))
        generate = f'{program} generate {self._name / L2D} --prompt "{prompt}" --max-new-tokens 1'
        return [generate, f"{generate} --num-inference-steps 1"]

    def write(self, results: Results, data: Data) -> list[Path]:
        """Write report, numbers and, with matplotlib, pictures.

        Args:
            results: what was measured.
            data: the questions.

        Returns:
            The files.
        """
        _write(self.folder / REPORT, markdown(results, data, self.commands(data)))
        _write(self.folder / NUMBERS, json.dumps(to_json(results), indent=2, ensure_ascii=False) + "\n")
        files = [self.folder / REPORT, self.folder / NUMBERS]
        if can_plot():
            draw_accuracy(results, self.folder / ACCURACY)
            draw_denoisings(results.denoisings, self.folder / DENOISING)
            files += [self.folder / ACCURACY, self.folder / DENOISING]
        return files


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core: matrices this small are slower on two, much slower where other work wants the second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
