"""Rows of data sets written as prompts and completions, in the words in which a task will ask."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from l2d_bench.data.makers import Maker
from l2d_bench.data.rows import write_rows
from l2d_framework.config.sections import UserPath
from l2d_framework.errors import DataError


class TemplatedRows(Maker):
    r"""`SPLIT.jsonl` with `prompt` and `completion` for each split of a data set.

    The templates name columns in braces, as in `"Question: {question}\nAnswer:"`.
    """

    kind: Literal["templated"] = "templated"
    path: UserPath = Field(min_length=1)
    """Hub id, folder or file."""
    name: str | None = None
    """Configuration of the data set."""
    splits: list[str] = Field(default=["train"], min_length=1)
    prompt: str
    completion: str

    def make(self, folder: Path) -> None:
        """Write the files.

        Args:
            folder: exists and is empty.

        Raises:
            DataError: if a template names a column that is not there.
        """
        from l2d_framework.config.sections import RowSource
        from l2d_framework.training.data.sources import load_rows

        for split in self.splits:
            data, columns, _ = load_rows(RowSource(path=self.path, name=self.name, split=split))
            try:
                rows = [
                    {"prompt": self.prompt.format_map(row), "completion": self.completion.format_map(row)}
                    for row in data
                ]
            except KeyError as error:
                raise DataError(
                    f"{self.path!r} has no column {error}, which a template names; its columns are {columns}."
                ) from error
            write_rows(folder / f"{split}.jsonl", rows)
