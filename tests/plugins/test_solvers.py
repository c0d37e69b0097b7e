import pytest
import torch
from odes import Ode, decay, measured_order, times
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from l2d_framework.errors import ConfigError, EvaluationBudgetError
from l2d_plugins.schedules.linear import Linear
from l2d_plugins.solvers import l2d_components
from l2d_plugins.solvers.adaptive import Bosh3, Fehlberg2
from l2d_plugins.solvers.runge_kutta import RK4, Euler, Heun, Midpoint

FIXED = [Euler(), Midpoint(), Heun(), RK4()]
ADAPTIVE = [Fehlberg2(), Bosh3()]
fixed = pytest.mark.parametrize("solver", FIXED, ids=lambda s: s.name)
adaptive = pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda s: s.name)
every = pytest.mark.parametrize("solver", FIXED + ADAPTIVE, ids=lambda s: s.name)

# Rates of the decay equation, of which one is stiff. So many tokens that arithmetic on all of them is vectorised.
COUNT, STIFF = 67, 40
RATES = torch.linspace(0.1, 8, COUNT).reshape(COUNT, 1, 1).clone()
RATES[STIFF] = 400
STARTS = 1 + torch.linspace(-2, 3, COUNT * 4).reshape(COUNT, 1, 4)


def test_the_solvers_are_offered_under_their_names():
    names = {c.component_name() for c in l2d_components()}
    assert names == {"euler", "midpoint", "heun", "rk4", "fehlberg2", "bosh3", "renoise"}


@every
def test_measured_order_is_the_declared_one(solver):
    assert measured_order(solver.step) == pytest.approx(solver.order, abs=0.15)


@every
def test_a_step_costs_the_declared_number_of_evaluations(solver):
    ode = Ode(decay(RATES))
    solver.step(ode, STARTS, 0.1, 0.2)
    assert ode.evaluations.unique().tolist() == [solver.stages]


@every
def test_a_straight_path_is_followed_exactly_enough_to_land_on_its_end(solver):
    clean = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(1, 2, 3)
    ode = Ode(lambda x, t: Linear().velocity(x, clean, t[..., 0]))
    noise = 64 * torch.randn(1, 2, 3, dtype=torch.float64)
    end = 1 - 1 / 64 if solver.evaluates_end else 1.0
    x = solver.solve(ode, noise, times(5, end))
    torch.testing.assert_close(x, Linear().interpolate(clean, noise, torch.full((1, 2), end, dtype=torch.float64)))


@fixed
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_exactly_num_inference_steps_are_used_read_out_included(solver, steps):
    asked = steps * solver.stages + 1
    assert solver.grid_size(asked) == steps + 1
    ode = Ode(decay(RATES))
    solver.solve(ode, STARTS, [0.9 * i / 7 for i in range(solver.grid_size(asked))])
    assert ode.evaluations.unique().tolist() == [asked - 1]


@pytest.mark.parametrize(
    ("solver", "asked", "neighbours"), [(Midpoint(), 8, "7 or 9"), (Heun(), 2, "1 or 3"), (RK4(), 16, "13 or 17")]
)
def test_a_number_of_evaluations_that_cannot_be_hit_is_refused_with_its_neighbours(solver, asked, neighbours):
    with pytest.raises(ConfigError, match=f"num_inference_steps={asked}.* {neighbours}"):
        solver.grid_size(asked)


def test_times_are_those_of_the_released_code():
    def visits(solver):
        ode = Ode(decay(RATES))
        solver.solve(ode, STARTS, [0.0, 0.5, 0.875])
        return pytest.approx(ode.visits)

    assert visits(Euler()) == [0, 0.5]
    assert visits(Midpoint()) == [0, 0.25, 0.5, 0.6875]
    assert visits(Heun()) == [0, 0.5, 0.5, 0.875]
    assert visits(RK4()) == [0, 1 / 6, 1 / 3, 0.5, 0.5, 0.625, 0.75, 0.875]


@every
def test_the_velocity_at_the_end_is_asked_for_only_if_declared(solver):
    ode = Ode(decay(RATES))
    solver.solve(ode, STARTS, [0.0, 0.3, 0.6])
    latest = max(float(torch.as_tensor(t).max()) for t in ode.visits)
    assert (latest == pytest.approx(0.6)) is solver.evaluates_end


# The estimate of fehlberg2 is that of its first-order member, whose error constant is small: 1/512.
@pytest.mark.parametrize(("solver", "constant"), [(Fehlberg2(), 500), (Bosh3(), 100)], ids=["fehlberg2", "bosh3"])
def test_the_error_follows_the_tolerance(solver, constant):
    # Stability, not the tolerance, bounds the steps of the stiff token: which of them pass hangs on the last digit.
    smooth = torch.arange(COUNT) != STIFF
    rates, starts = RATES.double()[smooth], STARTS.double()[smooth]
    exact = torch.cos(torch.tensor(0.9).double()) + (starts - 1) * torch.exp(-0.9 * rates)
    errors = []
    for tolerance in (1e-4, 1e-6):
        chosen = type(solver)(rtol=tolerance, atol=tolerance, max_evaluations=10**5)
        errors.append(float((chosen.solve(Ode(decay(rates)), starts, [0.0, 0.9]) - exact).abs().max()))
        assert errors[-1] < constant * tolerance
    assert errors[1] < errors[0] / 10


@adaptive
def test_a_token_does_not_feel_its_neighbours(solver):
    together = Ode(decay(RATES))
    x = solver.solve(together, STARTS, [0.0, 0.4, 0.9])
    for i in range(0, COUNT, 6):
        alone = Ode(decay(RATES[i : i + 1]))
        assert torch.equal(solver.solve(alone, STARTS[i : i + 1], [0.0, 0.4, 0.9])[0], x[i])
        assert alone.evaluations[0] == together.evaluations[i]
    # Positions of a row are as independent as rows.
    turned = Ode(decay(RATES.transpose(0, 1)))
    assert torch.equal(solver.solve(turned, STARTS.transpose(0, 1), [0.0, 0.4, 0.9]).transpose(0, 1), x)


@adaptive
def test_tokens_that_have_arrived_cost_nothing(solver):
    ode = Ode(decay(RATES))
    solver.solve(ode, STARTS, [0.0, 0.9])
    easy = torch.cat([ode.evaluations[:STIFF], ode.evaluations[STIFF + 1 :]])
    assert int(ode.evaluations[STIFF]) == len(ode.visits)
    assert int(easy.max()) < len(ode.visits) / 3


@adaptive
def test_every_time_of_the_grid_is_landed_on(solver):
    ode = Ode(decay(RATES))
    solver.solve(ode, STARTS, [0.0, 0.4, 0.9])
    visited = torch.stack([torch.as_tensor(t).expand(COUNT, 1) for t in ode.visits])
    for time in (0.4, 0.9):
        assert bool((visited == torch.tensor(time)).any(0).all())
    assert float(visited.max()) == torch.tensor(0.9)


@adaptive
def test_rounding_never_carries_an_evaluation_beyond_the_end(solver):
    long = solver.model_copy(update={"first_step": 1.0})
    for i in range(100):
        start, end = 0.003 * i, 0.5 + 0.004 * i
        ode = Ode(lambda x, t: torch.ones_like(x))
        long.solve(ode, torch.zeros(1, 1, 1), [start, end])
        assert float(ode.visits[-1]) == float(torch.tensor(end))


@adaptive
def test_the_first_evaluation_has_a_time_known_on_the_host(solver):
    ode = Ode(decay(RATES))
    solver.solve(ode, STARTS, [0.0, 0.9])
    assert ode.visits[0] == 0.0
    assert isinstance(ode.visits[0], float)


class HostReads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@adaptive
def test_the_host_waits_once_per_attempted_step(solver):
    ode = Ode(decay(RATES))
    with HostReads() as reads:
        solver.solve(ode, STARTS, [0.0, 0.9])
    attempts = (len(ode.visits) - 1) / (solver.stages - 1)
    assert reads.count == attempts + 1


@adaptive
def test_the_budget_is_never_exceeded_and_the_error_says_which_token_needed_more(solver):
    free = Ode(decay(RATES))
    solver.solve(free, STARTS, [0.0, 0.9])
    needed = int(free.evaluations.max()) + 1
    solver.with_budget(needed).solve(Ode(decay(RATES)), STARTS, [0.0, 0.9])

    ode = Ode(decay(RATES))
    message = (
        rf"'{solver.name}' may use {needed - 1} evaluations.*1 of {COUNT}.*row {STIFF}, position 0, reached t = 0\.\d+"
    )
    with pytest.raises(EvaluationBudgetError, match=message):
        solver.with_budget(needed - 1).solve(ode, STARTS, [0.0, 0.9])
    assert int(ode.evaluations.max()) + 1 <= needed - 1


@adaptive
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_velocity_that_is_not_finite_ends_in_the_budget_error(solver, value):
    bad = Ode(lambda x, t: torch.where(t > 0.3, value, x))
    with pytest.raises(EvaluationBudgetError, match=r"row 0, position 0, reached t = 0\.[23]\d*"):
        solver.solve(bad, STARTS, [0.0, 0.9])


@adaptive
def test_a_grid_of_one_time_moves_nothing(solver):
    ode = Ode(decay(RATES))
    assert torch.equal(solver.solve(ode, STARTS, [0.0]), STARTS)
    assert ode.visits == []


@adaptive
def test_an_adaptive_solver_needs_both_ends_and_one_step(solver):
    assert solver.grid_size(solver.stages + 1) == 2
    with pytest.raises(ConfigError, match=f"num_inference_steps={solver.stages}.*Use {solver.stages + 1} or more"):
        solver.grid_size(solver.stages)


@fixed
def test_a_fixed_step_solver_needs_no_budget(solver):
    assert solver.with_budget(3) is solver


@adaptive
@pytest.mark.parametrize("wrong", [{"rtol": 0.0}, {"atol": -1.0}, {"first_step": 2.0}, {"max_evaluations": 1}])
def test_values_out_of_range_are_refused(solver, wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        type(solver)(**wrong)
