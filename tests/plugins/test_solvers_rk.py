import subprocess
import sys

import pytest
import torch
from diffusion_models import shared_lm
from odes import Ode, decay, measured_order, pendulum, times

from l2d_framework.errors import ConfigError, EvaluationBudgetError, L2DError
from l2d_plugins.backbones.conditioning import Conditioning
from l2d_plugins.solvers import l2d_components as core_components
from l2d_plugins.solvers_rk import TorchDiffEqAdaptive, TorchDiffEqFixed, l2d_components

torchdiffeq = pytest.importorskip("torchdiffeq")

CORE = {c.component_name(): c() for c in core_components()}
METHODS = ["euler", "midpoint", "heun2", "heun3", "rk4"]
ADAPTIVE = ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
SAME = [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2"), ("rk4", "rk4")]
RATES = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).reshape(3, 1, 1)
STARTS = 1 + torch.linspace(-2, 3, 12, dtype=torch.float64).reshape(3, 1, 4)


def test_the_solvers_are_offered_under_their_names_and_declare_coupling_and_extra():
    assert [c.component_name() for c in l2d_components()] == ["torchdiffeq_fixed", "torchdiffeq_adaptive"]
    for component in l2d_components():
        assert component.batch_coupled
        assert component.requires == ("torchdiffeq",)
        assert component.extra == "l2d-framework[solvers-rk]"


def test_the_module_imports_without_torchdiffeq():
    script = (
        "import sys; sys.modules['torchdiffeq'] = None; import l2d_plugins.solvers_rk as m;"
        "print([c().component_name() for c in m.l2d_components()])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "torchdiffeq_adaptive" in done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_measured_order_is_the_declared_one(method):
    solver = TorchDiffEqFixed(method=method)
    assert measured_order(solver.step) == pytest.approx(solver.order, abs=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_exactly_num_inference_steps_are_used_read_out_included(method):
    solver, ode = TorchDiffEqFixed(method=method), Ode(decay(RATES))
    asked = 3 * solver.stages + 1
    solver.solve(ode, STARTS, times(solver.grid_size(asked), 0.9))
    assert ode.evaluations.unique().tolist() == [asked - 1]


def test_a_number_of_evaluations_that_cannot_be_hit_is_refused_with_its_neighbours():
    with pytest.raises(ConfigError, match=r"num_inference_steps=9.* 7 or 10"):
        TorchDiffEqFixed(method="heun3").grid_size(9)


@pytest.mark.parametrize("method", METHODS)
def test_the_velocity_at_the_end_is_asked_for_only_if_declared(method):
    solver, ode = TorchDiffEqFixed(method=method), Ode(decay(RATES))
    solver.solve(ode, STARTS, [0.0, 0.3, 0.6])
    assert (max(ode.visits) == 0.6) is solver.evaluates_end


@pytest.mark.parametrize(("core", "method"), SAME)
def test_core_solvers_make_the_moves_of_torchdiffeq(core, method):
    grid = [0.0, 0.2, 0.25, 0.6, 0.9]
    start = torch.tensor([[[0.4, 1.1], [-0.3, 2.0]]], dtype=torch.float64)
    field = Ode(pendulum)
    ends = torch.tensor(grid, dtype=torch.float64)
    states = torchdiffeq.odeint(lambda t, x: field.velocity(x, float(t)), start, ends, method=method)
    ours, theirs = Ode(pendulum), Ode(pendulum)
    x = CORE[core].solve(ours, start, grid)
    torch.testing.assert_close(x, states[-1], rtol=0, atol=1e-13)
    torch.testing.assert_close(TorchDiffEqFixed(method=method).solve(theirs, start, grid), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.tensor(ours.visits), torch.tensor(theirs.visits), rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["fehlberg2", "bosh3"])
def test_core_pairs_try_the_steps_of_torchdiffeq_on_a_single_token(method):
    ours, theirs = Ode(decay(RATES[:1])), Ode(decay(RATES[:1]))
    CORE[method].solve(ours, STARTS[:1], [0.0, 0.9])
    TorchDiffEqAdaptive(method=method).solve(theirs, STARTS[:1], [0.0, 0.9])
    # They part at the last step, which torchdiffeq lets overshoot the end.
    common = len(ours.visits) - len(CORE[method].tableau.nodes)
    assert common > 6
    visited, expected = (torch.tensor([float(t) for t in ode.visits[:common]]) for ode in (ours, theirs))
    torch.testing.assert_close(visited, expected)


@pytest.mark.parametrize("method", ["fehlberg2", "bosh3"])
def test_core_pairs_end_where_torchdiffeq_does(method):
    tight = {"rtol": 1e-6, "atol": 1e-6}
    x = type(CORE[method])(**tight).solve(Ode(decay(RATES)), STARTS, [0.0, 0.9])
    y = TorchDiffEqAdaptive(method=method, **tight).solve(Ode(decay(RATES)), STARTS, [0.0, 0.9])
    torch.testing.assert_close(x, y, rtol=0, atol=5e-4)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_error_follows_the_tolerance(method):
    exact = torch.cos(torch.tensor(0.9).double()) + (STARTS - 1) * torch.exp(-0.9 * RATES)
    for tolerance in (1e-4, 1e-6):
        solver = TorchDiffEqAdaptive(method=method, rtol=tolerance, atol=tolerance, max_evaluations=10**5)
        x = solver.solve(Ode(decay(RATES)), STARTS, [0.0, 0.9])
        assert float((x - exact).abs().max()) < 500 * tolerance


def test_adaptive_steps_are_shared_by_the_batch():
    stiff = torch.cat([RATES, torch.full((1, 1, 1), 300.0).double()])
    alone, beside = Ode(decay(RATES)), Ode(decay(stiff))
    TorchDiffEqAdaptive().solve(alone, STARTS, [0.0, 0.9])
    TorchDiffEqAdaptive().solve(beside, torch.cat([STARTS, STARTS[:1]]), [0.0, 0.9])
    assert int(beside.evaluations[0]) > 2 * int(alone.evaluations[0])


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_first_step_costs_the_declared_number_of_evaluations(method):
    solver, ode = TorchDiffEqAdaptive(method=method, first_step=0.95), Ode(lambda x, t: torch.ones_like(x))
    solver.solve(ode, STARTS, [0.0, 0.9])
    assert ode.evaluations.unique().tolist() == [solver.stages]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_velocity_is_never_asked_for_at_or_after_the_data(method):
    ode = Ode(lambda x, t: x / (1 - t))
    TorchDiffEqAdaptive(method=method).solve(ode, STARTS, [0.0, 1 - 1 / 64])
    assert max(ode.visits) < 1


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_budget_is_never_exceeded(method):
    solver, free = TorchDiffEqAdaptive(method=method), Ode(decay(RATES))
    solver.solve(free, STARTS, [0.0, 0.9])
    needed = int(free.evaluations.max()) + 1
    solver.with_budget(needed).solve(Ode(decay(RATES)), STARTS, [0.0, 0.9])
    ode = Ode(decay(RATES))
    with pytest.raises(EvaluationBudgetError, match=rf"'{method}' may use {needed - 1} evaluations.*t = 0\.\d+.*rtol"):
        solver.with_budget(needed - 1).solve(ode, STARTS, [0.0, 0.9])
    assert int(ode.evaluations.max()) + 1 <= needed - 1


@pytest.mark.parametrize("bad", [lambda x, t: x * torch.nan, lambda x, t: x**3 * 100])
def test_an_equation_that_blows_up_is_reported_as_such(bad):
    with pytest.raises(L2DError, match=r"'dopri5' gave up between t = 0 and 0\.9.*fixed-step"):
        TorchDiffEqAdaptive(max_evaluations=10**5).solve(Ode(bad), STARTS, [0.0, 0.9])


def test_a_failed_assertion_of_the_network_is_not_mistaken_for_one_of_torchdiffeq():
    def broken(x, t):
        raise AssertionError("a bug in the model")

    with pytest.raises(AssertionError, match="a bug in the model"):
        TorchDiffEqAdaptive().solve(Ode(broken), STARTS, [0.0, 0.9])


def test_a_grid_of_one_time_moves_nothing():
    ode = Ode(decay(RATES))
    assert torch.equal(TorchDiffEqAdaptive().solve(ode, STARTS, [0.0]), STARTS)
    assert ode.visits == []


def test_a_time_that_never_comes_again_leaves_no_table(monkeypatch):
    tabled, table = [], Conditioning.table
    monkeypatch.setattr(Conditioning, "table", lambda self, t: tabled.append(t) or table(self, t))
    loose = {"name": "torchdiffeq_adaptive", "method": "adaptive_heun", "rtol": 0.5, "atol": 0.5}
    prompt = torch.tensor([[5, 9, 7]])
    shared_lm().generate(prompt, solver=loose, num_inference_steps=None, max_new_tokens=2, eos_token_id=None)
    assert tabled == [1 - 1 / shared_lm().parametrization.prior_scale]
