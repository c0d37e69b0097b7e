"""Held-out rows by options, for the commands that measure a model on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2d_framework.errors import ConfigError

if TYPE_CHECKING:
    from l2d_framework.config import SamplingSection
    from l2d_framework.models.unloaded import UnloadedModel

Data = Annotated[list[str], typer.Option(help="Held-out rows: file, folder or hub id; may be given several times.")]
Name = Annotated[str | None, typer.Option(help="Configuration of the data sets.")]
Split = Annotated[str, typer.Option(help="Split of the data sets.")]
Columns = Annotated[
    list[str] | None, typer.Option(help="Column by another name, such as prompt=question; may be repeated.")
]
ClassColumn = Annotated[str | None, typer.Option(help="Column with the class label of a row.")]
Limit = Annotated[int, typer.Option(min=0, help="Rows to take of each data set; 0 for all.")]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Longest row in tokens, the rest is cut off; 2048 or the model's limit.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of all noise.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at a time; does not change the numbers.")]


@dataclass(frozen=True)
class HeldOutRows:
    """Which rows of which data sets, by the options of the same names."""

    data: list[str]
    name: str | None
    split: str
    columns: list[str] | None
    class_column: str | None
    limit: int
    max_length: int | None

    def check(self, source: UnloadedModel, sampling: SamplingSection) -> None:
        """Refuse a guidance towards a class where the rows name none."""
        where = "Add --class-column NAME, whose entries are class labels."
        source.check_class(sampling, is_named=self.class_column is not None, where=where)

    def read(self, source: UnloadedModel) -> tuple[list[Any], Any]:
        """The rows as the model reads them, and what the data was."""
        from l2d_framework.evaluation.diagnosis.batches import read_rows
        from l2d_framework.generation.prompts import context_length

        longest = context_length(source.lm_config)
        if self.max_length is not None and longest is not None and self.max_length > longest:
            raise ConfigError(f"--max-length {self.max_length} exceeds the model's context of {longest}. Lower it.")
        fields = {
            "name": self.name,
            "split": self.split,
            "class_column": self.class_column,
            "limit": self.limit or None,
            "columns": self._renamed(),
        }
        sources = [{"path": path, **fields} for path in self.data]
        return read_rows(source, sources, self.max_length or min(longest or 2048, 2048))

    def _renamed(self) -> dict[str, str]:
        pairs = [column.partition("=") for column in self.columns or []]
        for ours, sign, theirs in pairs:
            if not (ours and sign and theirs):
                raise ConfigError(f"--columns {ours + sign + theirs!r} must read OURS=THEIRS, such as prompt=question.")
        return {ours: theirs for ours, _, theirs in pairs}
