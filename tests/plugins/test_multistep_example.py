"""The example distribution of multistep solvers serves both methods, with all that may stand around a solver."""

import importlib.util
import sys
from importlib import metadata

import pytest
import torch
from diffusion_models import shared_lm, shared_tess
from fake_plugins import FakeEntryPoint, installed
from shared_folders import REPOSITORY
from tape_graph import TapeGraph

from l2d_framework.generation import replay
from l2d_framework.generation.prompts import pad_left
from l2d_framework.hooks import GROUP
from l2d_framework.testing.toys import ToyProblem
from l2d_plugins.guidance.classifier_free import ClassifierFree
from l2d_plugins.parametrizations.simplex.state import WideState
from l2d_plugins.schedules.cosine import Cosine
from l2d_plugins.schedules.linear import Linear
from l2d_plugins.solvers.runge_kutta import RK4

PROMPTS = [[9, 30, 71, 100, 42, 17, 201], [55, 44]]
NAMES = ["dpmpp_2m", "ab2"]


def imported():
    file = REPOSITORY / "plugins" / "examples" / "l2d-solver-multistep" / "l2d_multistep.py"
    spec = importlib.util.spec_from_file_location("l2d_multistep", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


MULTISTEP = imported()


@pytest.fixture(scope="module", autouse=True)
def offered():
    entry = FakeEntryPoint("multistep", lambda: MULTISTEP)
    with installed(*metadata.entry_points(group=GROUP), entry):
        yield


def drifting(x, t, key):
    return torch.sin(3 * t + key) + x / (1 + x.square())


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=lambda s: s.name)
@pytest.mark.parametrize("solver", MULTISTEP.l2d_components(), ids=lambda s: s.component_name())
def test_the_error_falls_with_the_square_of_the_step_on_the_schedules_of_both_methods(solver, schedule):
    keys = torch.arange(3)[None]
    x = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def end(solver, steps):
        grid = torch.linspace(0.1, 0.8, steps + 1, dtype=torch.float64).tolist()
        return solver.solve(ToyProblem(drifting, keys, schedule), x, grid)

    true = end(RK4(), 24)
    coarse, fine = ((end(solver(), steps) - true).abs().max() for steps in (32, 64))
    assert (coarse / fine).log2() == pytest.approx(2, abs=0.2)


def generate(model, solver, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 6, "num_inference_steps": 5, "eos_token_id": None, "solver": solver, **options}
    return model.generate(pad_left(prompts), **options)


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("model", [shared_lm, shared_tess])
@pytest.mark.parametrize("options", [{}, {"guidance": [ClassifierFree(scale=1.5)], "classes": ["a", "b"]}])
def test_both_methods_generate_and_no_row_depends_on_another(solver, model, options):
    model = model(classes=("a", "b"))
    together = generate(model, solver, **options)
    assert (together.evaluations == 5).all()
    alone = {**options, "classes": ["a"]} if options else {}
    assert torch.equal(generate(model, solver, PROMPTS[:1], **alone).answers, together.answers[:1])
    settled = generate(model, solver, patience=5, **options)
    assert torch.equal(settled.answers, together.answers)


@pytest.mark.parametrize("solver", NAMES)
def test_tokens_replayed_from_a_graph_are_those_of_the_plain_path(solver, monkeypatch):
    graphs = []
    monkeypatch.setitem(replay.GRAPHS, "cpu", lambda device: graphs.append(TapeGraph()) or graphs[-1])
    plain = generate(shared_lm(), solver, graph=False)
    assert not graphs
    assert torch.equal(generate(shared_lm(), solver).answers, plain.answers)
    assert any(graph.made is not None for graph in graphs)


@pytest.mark.parametrize("solver", MULTISTEP.l2d_components(), ids=lambda s: s.component_name())
def test_states_as_wide_as_the_vocabulary_stay_symbolic(solver):
    class Simplex(ToyProblem):
        def clean(self, x, t, *, active=None):
            assert isinstance(x, WideState)
            return WideState.simplex(torch.arange(3)[None] + round(9 * t), 5.0, 50)

        def velocity(self, x, t, *, active=None):
            return self.schedule.velocity(x, self.clean(x, t), torch.full((1, 3), t))

    start = 5 * WideState.normal(torch.arange(3)[None], 50, torch.device("cpu"))
    end = solver().solve(Simplex(drifting, torch.arange(3)[None], Cosine()), start, Cosine().grid(6, 1.0))
    assert isinstance(end, WideState)
    assert end.dense().isfinite().all()
