"""Pictures of tables."""

from types import SimpleNamespace

from l2d_bench.plan import CellPlan
from l2d_bench.plots import _curves
from l2d_bench.schema import Figure


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
