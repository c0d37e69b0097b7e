"""Answers to `tess2_alpaca_eval` in the format that the package alpaca_eval reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

from l2d_framework.errors import DataError
from l2d_framework.lines import read_objects
from l2d_framework.writing import write_whole


def write_outputs(samples: Path, file: Path, generator: str) -> int:
    """Write the answers of a run for the judge, in the order of the data set.

    Args:
        samples: `samples_tess2_alpaca_eval_*.jsonl` as `--log_samples --output_path` leaves it.
        file: to write; `alpaca_eval --model_outputs FILE` reads it.
        generator: name of the model in the judge's tables.

    Returns:
        Number of answers.

    Raises:
        DataError: if the file holds no answers to that task.
    """
    try:
        rows = [_output(row, generator) for _, row in read_objects(samples)]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{samples} holds no answers to tess2_alpaca_eval ({error!r}). Give the file samples_tess2_alpaca_eval_*"
            ".jsonl that `l2d eval --tasks tess2_alpaca_eval --log_samples --output_path FOLDER` writes."
        ) from error
    if not rows:
        raise DataError(f"{samples} is empty. Run the task again with --log_samples.")
    outputs = [row for _, row in sorted(rows, key=lambda entry: entry[0])]
    write_whole(file, json.dumps(outputs, ensure_ascii=False, indent=2) + "\n")
    return len(outputs)


def _output(sample: dict[str, Any], generator: str) -> tuple[int, dict[str, str]]:
    row = sample["doc"]
    found = {"instruction": row["instruction"], "output": sample["resps"][0][0].strip(), "generator": generator}
    return int(sample["doc_id"]), found | {"dataset": row["dataset"]}


def main(samples: Path, file: Path, generator: str) -> None:
    """Write SAMPLES of tess2_alpaca_eval to FILE, as answers of the model GENERATOR, for `alpaca_eval`."""
    try:
        typer.echo(f"{write_outputs(samples, file, generator)} answers in {file}")
    except DataError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    typer.run(main)
