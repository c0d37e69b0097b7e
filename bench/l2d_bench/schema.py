"""Files of `bench/tables` and `bench/profiles`: what a table holds, and what each of its cells is in one profile."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from l2d_framework.config.sections import Section


class Sweep(Section):
    """One row at several values of one option, each a row of its own and a point of the figure."""

    option: str
    """Name of a model argument, such as `num_inference_steps`."""
    values: list[Any] = Field(min_length=1)


class Row(Section):
    """A row of a table: a model and how to sample from it."""

    label: str
    """The paper's name of the row."""
    model: str | None = None
    """Key of a model in the profile; None for a row of printed values only."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the adapter, `lm_eval --model l2d --model_args`; `model:KEY` stands for another model's folder."""
    columns: list[str] | None = None
    """Columns this row is measured in; all when None."""
    column_models: dict[str, str] = Field(default_factory=dict)
    """Other models by column, such as one finetuned for its task."""
    column_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further options by column, such as a guidance scale tuned for one kind of task."""
    sweep: Sweep | None = None
    series: str | None = None
    """Line of the figure this row belongs to; its label when None."""
    x: float | None = None
    """Place on the figure's horizontal axis; a sweep fills it in."""
    paper_row: str | None = None
    """The paper's name of the row where a profile gives it another; the label when None."""
    not_rerun: str | None = None
    """Why the paper's values are printed without a measurement beside them."""

    @model_validator(mode="after")
    def _measured_or_not(self) -> Self:
        if (self.model is None) == (self.not_rerun is None):
            raise ValueError(f"row {self.label!r} needs either a model or not_rerun; give one of them")
        return self


class Figure(Section):
    """The picture of a table."""

    kind: Literal["lines", "bars", "curves", "heatmap"]
    """`lines`: columns against each row's x, a line per series; `bars`: columns side by side, a bar per row; `curves`:
    the curve a measure recorded, one per row; `heatmap`: the matrix a measure recorded."""
    x: str = ""
    """Label of the horizontal axis."""
    y: str = ""
    columns: list[str] | None = None
    """Columns drawn, one panel each; all that hold numbers when None."""
    detail: str | None = None
    """With `bars`: a second panel with this detail of each measurement, such as `evaluations_per_token`."""
    log_x: bool = False
    curves: list[str] | None = None
    """With `curves`: which of them, such as `accuracy`; all when None."""
    rows: list[str] | None = None
    """With `curves`: labels of the rows drawn; all when None."""
    titles: dict[str, str] = Field(default_factory=dict)
    """With `curves`: titles of panels by the curve, or by `CURVE, MEASURE` where several measures record it."""


class TableFile(Section):
    """A table of a paper, without saying how large its models are or which data serve."""

    title: str
    reference: str
    """Paper and number of the table or figure, such as `L2D (arXiv:2501.15781), Table 1`."""
    paper: list[str] = Field(default_factory=list)
    """Keys in `paper.json`, the first that has a column counts; none for a figure without printed numbers."""
    transposed: bool = False
    """True where the paper prints models as columns."""
    columns: list[str] = Field(min_length=1)
    paper_columns: dict[str, str] = Field(default_factory=dict)
    """The paper's names of columns that have another here, since both papers have a GSM8K of their own."""
    rows: list[Row] = Field(min_length=1)
    figure: Figure | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _draws_its_rows(self) -> Self:
        wanted = (self.figure.rows if self.figure else None) or []
        if missing := sorted(set(wanted) - {row.label for row in self.rows}):
            raise ValueError(f"figure.rows names {missing}, labels that no row has")
        return self


class Column(Section):
    """Where the numbers of a column come from: exactly one of its fields `measure`, `mean` and `no_data`."""

    measure: str | None = None
    """Key of a measure of the profile."""
    metric: str | None = None
    """Which of its values; the only one when None. Of a task: lm_eval's `metric,filter`, such as
    `exact_match,strict-match`."""
    mean: list[str] | None = None
    """Columns to average."""
    no_data: str | None = None
    """Why this profile has no number here."""
    scale: float = 1.0
    """Factor of what is printed: 100 for shares printed in percent."""
    digits: int = 2
    label: str | None = None
    """What is measured where it is not what the paper's column says, such as `reward of a held-out model`."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("measure", "mean", "no_data") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a column needs exactly one of measure, mean and no_data, got {given or 'none'}")
        return self


class Model(Section):
    """A model of a profile: a run file, something published, or the reason why there is none."""

    run: str | None = None
    """Run file, relative to `bench/`. The engine fills in output_dir and seed."""
    stage: int | None = None
    """Which of its `stages`, from 0; None for a file with one run."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Values by dotted path, such as `training.max_steps: 100`. `model:KEY` stands for another model's folder, as in
    `model.base: model:base`, `data:KEY` for a folder of made data, as in `data.train.0.path: data:demo/base.jsonl`."""
    seed: int | None = None
    """The same model for all seeds of the profile, trained with this seed."""
    pretrained: str | None = None
    """Hub id or folder."""
    revision: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the adapter for every row with this model. A plain language model gets `num_inference_steps: 0`."""
    no_data: str | None = None
    """Why this profile has no such model."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("run", "pretrained", "no_data") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a model needs exactly one of run, pretrained and no_data, got {given or 'none'}")
        return self


class RowChange(Section):
    """What a profile changes about a row; fields left out stay."""

    label: str | None = None
    """What to call the row here; the paper's numbers stay beside it."""
    model: str | None = None
    options: dict[str, Any] | None = None
    column_models: dict[str, str] | None = None
    column_options: dict[str, dict[str, Any]] | None = None
    columns: list[str] | None = None
    sweep: Sweep | None = None
    x: float | None = None


class TableChange(Section):
    """What a profile changes about a table."""

    columns: list[str] | None = None
    """Columns in place of the table's own; the paper's number stands beside those whose name it knows."""
    extra: list[str] = Field(default_factory=list)
    """Columns of the profile's own beside the paper's."""
    rows: dict[str, RowChange] = Field(default_factory=dict)
    """Changes by label."""
    note: str | None = None
    figure: Figure | None = None


class ProfileFile(Section):
    """A size at which tables are run: models, data, tasks and limits."""

    title: str
    seeds: list[int] = Field(min_length=1)
    device: Literal["cpu", "cuda", "auto"] = "auto"
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Of the weights in evaluation."""
    batch_size: int | Literal["auto"] = 16
    threads: int = Field(default=1, gt=0)
    """Of torch in each process: matrices of tiny models are slower on two."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the adapter below those of models and rows."""
    data: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Data made before training: `kind` and the fields of a class in `l2d_bench.data.makers`."""
    measures: dict[str, dict[str, Any]]
    """What is run on a model, once for all columns that show one of its values: `kind` and the fields of a class in
    `l2d_bench.kinds`."""
    columns: dict[str, Column]
    extra: dict[str, list[str]] = Field(default_factory=dict)
    """Further columns of tables whose id matches a pattern such as `l2d_*`."""
    models: dict[str, Model]
    tables: dict[str, TableChange] = Field(default_factory=dict)
