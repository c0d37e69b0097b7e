"""The re-noising sampler of TESS 2, on equations whose clean state is known."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from l2d_framework.simplex_state import WideState, dense
from l2d_framework.testing.toys import ToyProblem
from l2d_plugins.schedules.cosine import Cosine
from l2d_plugins.schedules.linear import Linear
from l2d_plugins.solvers.renoise import Renoise

KEYS = torch.arange(6).view(2, 3)
SIZE = 4

schedules = pytest.mark.parametrize("schedule", [Linear(), Cosine(), Cosine(steps=None)])


class Problem(ToyProblem):
    """A toy equation under a schedule of choice, which keeps the noise it hands out."""

    def __init__(self, schedule, law=None):
        super().__init__(law or (lambda x, t, key: key + torch.zeros_like(x)), KEYS)
        self.schedule, self.noises = schedule, []

    def fresh_noise(self, x):
        self.noises.append(super().fresh_noise(x))
        return self.noises[-1]


def start():
    return torch.randn(*KEYS.shape, SIZE, dtype=torch.float64)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@schedules
def test_a_step_leads_to_the_estimate_under_fresh_noise_of_the_next_level(schedule):
    problem, x = Problem(schedule), start()
    found = Renoise().step(problem, x, 0.2, 0.7)
    s = torch.full(KEYS.shape, 0.7, dtype=torch.float64)
    clean = KEYS[..., None] + torch.zeros_like(x)
    close(found, schedule.alpha(s)[..., None] * clean + schedule.sigma(s)[..., None] * problem.noises[0])


@schedules
def test_where_it_came_from_matters_through_the_estimate_alone(schedule):
    ends = [Renoise().step(Problem(schedule), x, 0.2, 0.7) for x in (start(), start())]
    assert torch.equal(*ends)


def test_every_step_draws_noise_of_its_own_and_costs_one_evaluation():
    problem = Problem(Cosine())
    Renoise().solve(problem, start(), Cosine().grid(6, 1.0))
    assert (problem.evaluations == 5).all()
    assert len(problem.noises) == 5
    assert not any(torch.equal(a, b) for a, b in pairwise(problem.noises))
    assert Renoise().grid_size(6) == 6


@schedules
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_end_is_the_last_estimate_itself(schedule, deterministic):
    problem = Problem(schedule, lambda x, t, key: (x + key).tanh())
    x = Renoise(deterministic=deterministic).solve(problem, start(), schedule.grid(4, 1.0)[:-1])
    t = schedule.grid(4, 1.0)[-2]
    found = Renoise(deterministic=deterministic).step(problem, x, t, 1.0)
    close(found, (x + KEYS[..., None]).tanh())


@schedules
def test_the_deterministic_variant_stays_on_the_path_to_a_constant_estimate(schedule):
    problem, noise = Problem(schedule), start()
    clean = KEYS[..., None] + torch.zeros_like(noise)
    t, s = (torch.full(KEYS.shape, time, dtype=torch.float64) for time in (0.2, 0.7))
    found = Renoise(deterministic=True).step(problem, schedule.interpolate(clean, noise, t), 0.2, 0.7)
    close(found, schedule.interpolate(clean, noise, s))
    assert not problem.noises


@schedules
def test_the_deterministic_variant_is_ddim(schedule):
    problem, x = Problem(schedule, lambda x, t, key: (x + key).sin()), start()
    found = Renoise(deterministic=True).step(problem, x, 0.3, 0.6)
    t, s = (torch.full((*KEYS.shape, 1), time, dtype=torch.float64) for time in (0.3, 0.6))
    clean = (x + KEYS[..., None]).sin()
    noise = (x - schedule.alpha(t) * clean) / schedule.sigma(t)
    close(found, schedule.alpha(s) * clean + schedule.sigma(s) * noise)


def test_a_straight_deterministic_path_is_that_of_euler():
    problem, x = Problem(Linear(), lambda x, t, key: (x + key).sin()), start()
    found = Renoise(deterministic=True).step(problem, x, 0.3, 0.6)
    close(found, x + 0.3 * problem.velocity(x, 0.3))


def test_where_no_noise_is_left_the_deterministic_variant_stays_at_the_estimate():
    found = Renoise(deterministic=True).step(Problem(Cosine()), start(), 1.0, 1.0)
    close(found, KEYS[..., None] + torch.zeros_like(found))


@pytest.mark.parametrize("deterministic", [True, False])
def test_states_as_wide_as_the_vocabulary_stay_small(deterministic):
    tokens = torch.tensor([[1, 2, 3], [0, 0, 1]])

    class Wide(Problem):
        def clean(self, x, t, *, active=None):
            return WideState.simplex(tokens, 5.0, SIZE)

        def fresh_noise(self, x):
            return 5.0 * WideState.normal(KEYS, SIZE, torch.device("cpu"))

    problem, solver = Wide(Cosine()), Renoise(deterministic=deterministic)
    x = solver.solve(problem, problem.fresh_noise(None), Cosine().grid(5, 1.0))
    assert isinstance(x, WideState)
    assert len(x.parts) <= 6
    close(dense(x), dense(problem.clean(None, 0.0)))


def test_only_the_plain_variant_is_stochastic():
    assert Renoise().is_stochastic
    assert not Renoise(deterministic=True).is_stochastic


def test_values_out_of_range_are_refused():
    with pytest.raises(ValidationError, match="deterministic"):
        Renoise(deterministic=1)
