"""Pictures of tables."""

from types import SimpleNamespace

import matplotlib.figure
import pytest
from pydantic import ValidationError

from l2d_bench.plan import CellPlan
from l2d_bench.plots import _curves
from l2d_bench.schema import Figure, TableFile


def test_curves_of_two_measures_have_panels_of_their_own():
    measures = {"one": "steps", "again": "steps", "other": "choices", "alone": "loss"}
    cells = {(0, name): CellPlan(SimpleNamespace(measure=measure), (measure,)) for name, measure in measures.items()}
    found = {"steps": "accuracy", "choices": "accuracy", "loss": "per_token"}
    filled = SimpleNamespace(
        plan=SimpleNamespace(rows=[SimpleNamespace(label="row")], columns=list(measures), cells=cells),
        outcomes={key: SimpleNamespace(curves={curve: [[0.0, 1.0]]}) for key, curve in found.items()},
    )
    panels = [name for name, _ in _curves(filled, Figure(kind="curves"))]
    assert panels == ["accuracy, steps", "accuracy, choices", "per token"]
    assert [name for name, _ in _curves(filled, Figure(kind="curves", curves=["per_token"]))] == ["per token"]
    titles = {"accuracy, steps": "sums", "per_token": "loss"}
    panels = [name for name, _ in _curves(filled, Figure(kind="curves", titles=titles))]
    assert panels == ["sums", "accuracy, choices", "loss"]
    assert not _curves(filled, Figure(kind="curves", rows=[]))


def test_a_figure_draws_rows_that_its_table_has():
    table = {"title": "t", "reference": "r", "columns": ["c"], "rows": [{"label": "one", "model": "m"}]}
    TableFile.model_validate({**table, "figure": {"kind": "curves", "rows": ["one"]}})
    with pytest.raises(ValidationError, match=r"figure.rows names \['another'\]"):
        TableFile.model_validate({**table, "figure": {"kind": "curves", "rows": ["another", "one"]}})


def test_a_row_has_one_colour_in_all_panels_whose_legend_is_shared():
    labels, columns = ["first", "second", "third"], ["tokens", "choices"]
    known = [(0, "tokens"), (1, "tokens"), (1, "choices"), (2, "choices")]
    cells = {
        (row, name): CellPlan(SimpleNamespace(measure=name), (f"{row} {name}",) if (row, name) in known else ())
        for row in range(3)
        for name in columns
    }
    filled = SimpleNamespace(
        plan=SimpleNamespace(rows=[SimpleNamespace(label=label) for label in labels], columns=columns, cells=cells),
        outcomes={f"{row} {name}": SimpleNamespace(curves={"loss": [[0.0, 1.0, 0.1]]}) for row, name in known},
    )
    colours = {}
    for _, paint in _curves(filled, Figure(kind="curves")):
        axes = matplotlib.figure.Figure().subplots()
        paint(axes)
        for (line, *_), label in zip(*axes.get_legend_handles_labels(), strict=True):
            colours.setdefault(label, set()).add(line.get_color())
    assert sorted(map(len, colours.values())) == [1, 1, 1]
    assert len(set.union(*colours.values())) == 3
