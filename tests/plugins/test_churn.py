"""Churn: steps that first go back towards the noise."""

import pytest
import torch

from l2d_framework.testing.toys import ToyProblem
from l2d_plugins.schedules.cosine import Cosine
from l2d_plugins.schedules.linear import Linear
from l2d_plugins.solvers.runge_kutta import Euler

KEYS = torch.arange(6).view(2, 3)
SIZE = 4000

schedules = pytest.mark.parametrize("schedule", [Linear(), Cosine(steps=None)])


class Problem(ToyProblem):
    """An equation whose clean state is known, which keeps the states and times it is asked about."""

    def __init__(self, schedule):
        super().__init__(lambda x, t, key: key + torch.zeros_like(x), KEYS)
        self.schedule, self.asked = schedule, []

    def velocity(self, x, t, *, active=None):
        self.asked.append((x, t))
        return super().velocity(x, t, active=active)


def clean():
    return KEYS[..., None] + torch.zeros(*KEYS.shape, SIZE, dtype=torch.float64)


@schedules
def test_the_state_it_asks_about_is_as_noisy_as_its_time_says(schedule):
    problem, t = Problem(schedule), torch.full(KEYS.shape, 0.6, dtype=torch.float64)
    noise = torch.randn(*KEYS.shape, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Euler(churn=1.5).step(problem, schedule.interpolate(clean(), noise, t), 0.6, 0.8)
    ((x, back),) = problem.asked
    assert back == pytest.approx(0.6 * (1 - 1.5 * 0.2))
    then = torch.tensor(back, dtype=torch.float64)
    rest = x - schedule.alpha(then) * clean()
    torch.testing.assert_close(rest.std(-1), schedule.sigma(then).expand(KEYS.shape), rtol=0.06, atol=0)
    torch.testing.assert_close(rest.mean(-1), torch.zeros(KEYS.shape, dtype=torch.float64), rtol=0, atol=0.06)
    # Some of the noise is new, some that of before.
    shared = (rest * noise).mean(-1) / schedule.sigma(then)
    assert ((shared > 0.2) & (shared < 0.9)).all()


def test_it_still_ends_at_the_last_estimate():
    problem, schedule = Problem(Linear()), Linear()
    end = Euler(churn=1.0).solve(problem, torch.randn(*KEYS.shape, SIZE, dtype=torch.float64), schedule.grid(6, 1.0))
    torch.testing.assert_close(end, clean(), rtol=0, atol=1e-6)
    assert len(problem.asked) == 5


def test_without_churn_it_is_eulers_method_and_draws_nothing(monkeypatch):
    monkeypatch.setattr(Problem, "fresh_noise", None)
    problem, x = Problem(Linear()), torch.randn(*KEYS.shape, 3, dtype=torch.float64)
    found = Euler(churn=0.0).step(problem, x, 0.3, 0.6)
    assert torch.equal(found, x + (0.6 - 0.3) * problem.velocity(x, 0.3))
    assert not Euler().is_stochastic
    assert Euler(churn=0.1).is_stochastic


def test_pure_noise_stays_what_it_is():
    problem, x = Problem(Linear()), torch.randn(*KEYS.shape, 3, dtype=torch.float64)
    Euler(churn=1.0).step(problem, x, 0.0, 0.2)
    ((asked, t),) = problem.asked
    assert t == 0
    assert torch.equal(asked, x)
