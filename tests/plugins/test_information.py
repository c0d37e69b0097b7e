"""Time uniform in information, on a toy whose cross-entropy over time is known."""

import math
from functools import cache

import pytest
import torch
from pydantic import ValidationError

from l2d_plugins.schedules.cosine import Cosine
from l2d_plugins.schedules.information import Information, _falling
from l2d_plugins.schedules.linear import Linear

LOCATION, SCALE, NATS = 1.3, 0.6, 5.0
FAMILIES = ["piecewise", "gumbel"]
BASES = [Linear(), Cosine(), Linear(minimum_noise=0.2)]


def cross_entropy(law, t):
    """The distribution function of a Gumbel variable in log(sigma^2 / alpha^2), times a number of nats."""
    gamma = 2 * (law.sigma(t).log() - law.alpha(t).log())
    return NATS * torch.exp(-torch.exp(-(gamma - LOCATION) / SCALE))


@cache
def taught(updates=20, *, noise=0.5, **fields):
    """A law that has heard noisy losses of the toy at its own training times."""
    law = Information(**fields).build()
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        t = law.sample_times(torch.rand(60_000, generator=generator))
        law.observe(t, cross_entropy(law, t) + noise * torch.randn(60_000, generator=generator))
    return law


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", BASES)
def test_the_cross_entropy_falls_by_as_much_at_every_step_once_enough_losses_were_heard(base, family):
    law = taught(base=base, family=family, uniform=0.01)
    times = law.sample_times(torch.linspace(0, 1, 11, dtype=torch.float64)[:-1])
    steps = -cross_entropy(law, times).diff()
    assert steps.min() > 0.9 * NATS / 10
    assert steps.max() < 1.1 * NATS / 10
    even = cross_entropy(law, base.sample_times(torch.linspace(0, 1, 11, dtype=torch.float64)[:-1])).diff().abs()
    assert even.max() > 2 * NATS / 10


@pytest.mark.parametrize("base", BASES[:2])
def test_the_gumbel_family_finds_the_location_and_scale(base):
    assert taught(base=base, family="gumbel").gumbel() == pytest.approx((LOCATION, SCALE), abs=0.03)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_shares_rise_strictly_from_nothing_to_all_whatever_was_heard(family, seed):
    law = Information(family=family, knots=50).build()
    generator = torch.Generator().manual_seed(seed)
    for size in (1, 30, 5000):
        law.observe(torch.rand(size, generator=generator), 10 * torch.randn(size, generator=generator))
        share = law.share()
        assert (float(share[0]), float(share[-1])) == (0, pytest.approx(1))
        assert (share.diff() > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("end", [1.0, 0.7])
def test_the_grid_visits_what_training_visits(base, family, end):
    law = taught(10, base=base, family=family)
    grid = law.grid(9, end)
    assert (grid[0], grid[-1]) == (0.0, end)
    u = torch.linspace(0, 1, 100001, dtype=torch.float64)
    reached = float((law.sample_times(u) <= end).double().mean())
    wanted = law.sample_times(reached * torch.linspace(0, 1, 9, dtype=torch.float64))
    torch.testing.assert_close(torch.tensor(grid[:-1], dtype=torch.float64), wanted[:-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("base", BASES)
def test_before_any_loss_is_heard_times_are_uniform_up_to_the_last_of_the_base(base):
    law, u = Information(base=base).build(), torch.rand(100)
    last = float(base.sample_times(torch.tensor([0.0, 1 - 2**-24])).max())
    torch.testing.assert_close(law.sample_times(u), last * u)
    assert (law.grid(1, 0.9), law.grid(2, 0.9)) == (base.grid(1, 0.9), [0.0, 0.9])


def test_alpha_sigma_and_velocity_are_those_of_the_base():
    t, x, clean = torch.rand(2, 3), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for base in BASES:
        law = taught(2, base=base)
        assert torch.equal(law.velocity(x, clean, t), base.velocity(x, clean, t))
        assert torch.equal(law.interpolate(clean, x, t), base.interpolate(clean, x, t))
        assert torch.equal(law.fixed_times(t), base.sample_times(t))


def test_training_times_keep_to_the_noise_that_the_base_asks_for():
    law = taught(5, base=Linear(minimum_noise=0.2))
    assert law.sample_times(torch.rand(10000)).max() <= 0.8


def test_falling_means_are_those_of_pooling_adjacent_violators():
    generator = torch.Generator().manual_seed(0)
    counts = torch.rand(40, generator=generator, dtype=torch.float64) + 0.01
    sums = counts * (torch.randn(40, generator=generator, dtype=torch.float64) - torch.linspace(0, 2, 40))
    pools = []
    for pair in zip(sums.tolist(), counts.tolist(), strict=True):
        pools.append([*pair, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] < pools[-1][0] / pools[-1][1]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    wanted = [total / mass for total, mass, length in pools for _ in range(length)]
    torch.testing.assert_close(_falling(sums, counts), torch.tensor(wanted, dtype=torch.float64))


def test_losses_that_are_no_numbers_are_not_heard():
    law, other = Information().build(), Information().build()
    t, loss = torch.rand(100), torch.rand(100)
    law.observe(torch.cat([t, t[:2]]), torch.cat([loss, torch.tensor([math.nan, math.inf])]))
    other.observe(t, loss)
    torch.testing.assert_close(law.statistics, other.statistics)


def test_old_losses_are_forgotten_at_the_rate_of_the_memory():
    law = Information(memory=4, knots=2).build()
    law.observe(torch.zeros(8), torch.ones(8))
    law.observe(torch.zeros(0), torch.zeros(0))
    assert law.statistics[:, 0].tolist() == [6, 6]


@pytest.mark.parametrize(
    "wrong", [{"knots": 1}, {"memory": 0}, {"uniform": 0.0}, {"family": "normal"}, {"base": {"name": "information"}}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Information.model_validate(wrong)
