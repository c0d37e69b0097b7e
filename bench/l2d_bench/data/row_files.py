"""Files of rows: written down in a profile, or taken from a data set."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from l2d_bench.data.makers import Maker

FILE = "rows.jsonl"
"""What both makers write."""


class GivenRows(Maker):
    """The rows of the profile itself, as `rows.jsonl`."""

    kind: Literal["given_rows"] = "given_rows"
    rows: list[dict[str, Any]] = Field(min_length=1)

    def make(self, folder: Path) -> None:
        """Write them.

        Args:
            folder: exists and is empty.
        """
        _write(folder, self.rows)


class DataSetRows(Maker):
    """Rows of a data set of the hub, or of a folder named like one, as `rows.jsonl`."""

    kind: Literal["data_set_rows"] = "data_set_rows"
    path: str
    name: str | None = None
    revision: str | None = None
    data_files: str | None = None
    """Files of the split, such as `en/c4-validation.*.json.gz`, where fetching all splits would be too much."""
    split: str
    columns: dict[str, str] = Field(min_length=1)
    """The data set's columns by the names they get."""
    min_words: dict[str, int] = Field(default_factory=dict)
    """Least number of white-space words by column; shorter rows are passed over."""
    most_characters: int | None = Field(default=None, gt=0)
    """Of all columns of a row together; longer rows are passed over."""
    shuffle_seed: int | None = None
    limit: int | None = Field(default=None, gt=0)

    def missing(self) -> str | None:
        """Look for the data set.

        Returns:
            What is missing; None if it is there.
        """
        from l2d_framework.evaluation.hub import is_reachable

        return None if is_reachable(self.path, "dataset") else f"data set {self.path} cannot be reached"

    def make(self, folder: Path) -> None:
        """Write them.

        Args:
            folder: exists and is empty.
        """
        import datasets

        files = None if self.data_files is None else {self.split: self.data_files}
        rows = datasets.load_dataset(self.path, self.name, data_files=files, split=self.split, revision=self.revision)
        rows = rows.filter(lambda row: all(len(row[name].split()) >= n for name, n in self.min_words.items()))
        if (most := self.most_characters) is not None:
            rows = rows.filter(lambda row: sum(len(row[column]) for column in self.columns.values()) <= most)
        if self.shuffle_seed is not None:
            rows = rows.shuffle(seed=self.shuffle_seed)
        if self.limit is not None:
            rows = rows.select(range(min(self.limit, len(rows))))
        _write(folder, ({name: row[column] for name, column in self.columns.items()} for row in rows))


def _write(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    with (folder / FILE).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
