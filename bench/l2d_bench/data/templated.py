"""Rows of data sets written as prompts and completions, in the words in which a task will ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
    choices: str | None = None
    """Column with possible answers as `{text: [...], label: [...]}`; `{choices}` of a template names them all."""
    chat: bool = False
    """Write `messages` of a user and an assistant instead of `prompt` and `completion`."""

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
                rows = [self._row(row) for row in data]
            except KeyError as error:
                raise DataError(
                    f"{self.path!r} has no column {error}, which a template names; its columns are {columns}."
                ) from error
            write_rows(folder / f"{split}.jsonl", rows)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.choices is not None:
            labelled = zip(row[self.choices]["label"], row[self.choices]["text"], strict=True)
            row = row | {"choices": "\n".join(f"{label}. {text}" for label, text in labelled)}
        prompt, completion = self.prompt.format_map(row), self.completion.format_map(row)
        if not self.chat:
            return {"prompt": prompt, "completion": completion}
        turns = (("user", prompt), ("assistant", completion))
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
