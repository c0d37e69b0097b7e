"""Time uniform in information, on a toy whose cross-entropy over time is known."""

import math
from functools import cache

import pytest
import torch
from pydantic import ValidationError

from l2d_plugins.schedules import information
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


def update(law, generator, cross_entropy, *, share=1):
    """Losses of 2,000 tokens with realistic noise; half of its variance is common to `share` tokens of one time."""
    t = law.sample_times(torch.rand(2000 // share, generator=generator)).repeat_interleave(share)
    common = torch.randn(2000 // share, generator=generator).repeat_interleave(share)
    law.observe(t, cross_entropy(t) + 2.5 * (common + torch.randn(2000, generator=generator)) / math.sqrt(2))


def densest(law):
    """Share of the training times in the twentieth of the axis that has most, in hundredths of it."""
    counts = law.sample_times(torch.linspace(0, 1, 100_001)[:-1]).histc(100, 0, 1)
    return float(counts.sort().values[-5:].sum() / 100_000)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [1, 20])
@pytest.mark.parametrize("drift", [0, 7])
def test_flat_noisy_losses_leave_times_nearly_uniform(family, seed, share, drift):
    law = Information(family=family).build()
    generator = torch.Generator().manual_seed(seed)
    for step in range(50):
        level = 3 + drift * (1 - step / 50)
        update(law, generator, lambda t, level=level: level + 0 * t, share=share)
        if step % 10 == 9:
            assert densest(law) < 0.06


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", [0.0, 0.1, math.log(49_152), 300.0])
def test_losses_without_noise_or_fall_leave_times_uniform(family, level):
    law = Information(family=family).build()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        t = torch.rand(2000, generator=generator)
        law.observe(t, torch.full_like(t, level))
    assert law.share().tolist() == pytest.approx(torch.linspace(0, 1, 257).tolist(), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [1, 20])
def test_after_flat_losses_a_real_fall_is_found_within_50_updates(family, seed, share):
    law = Information(family=family).build()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(21):
        update(law, generator, lambda t: 3 + 0 * t, share=share)
    for _ in range(50):
        update(law, generator, lambda t: 1 + 2 * torch.sigmoid((0.6 - t) / 0.05), share=share)
    times = law.sample_times(torch.linspace(0, 1, 10_001)[:-1])
    assert ((times > 0.5) & (times < 0.7)).float().mean() > 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_weighs_alike_at_every_knot_however_often_it_is_visited(family):
    law = taught(20, family=family, knots=32)
    assert densest(law) > 0.2
    other = Information(family=family, knots=32, memory=1).build()
    other.load_state_dict(law.state_dict())
    times = law.sample_times((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000)
    other.observe(times, torch.zeros_like(times))
    mass = other.statistics[1]
    torch.testing.assert_close(mass[1:-1], torch.full((31,), 1e6 / 32, dtype=torch.float64), rtol=0.01, atol=0)
    torch.testing.assert_close(mass[[0, -1]], torch.full((2,), 5e5 / 32, dtype=torch.float64), rtol=0.01, atol=0)


@pytest.mark.parametrize("move", [torch.bfloat16, torch.float16, "meta"])
def test_what_was_heard_stays_on_the_host_and_as_precise_wherever_the_model_goes(move):
    law = Information().build()
    law.observe(torch.rand(1000), torch.rand(1000))
    heard = law.statistics.clone()
    moved = torch.nn.ModuleList([law]).to(move)[0]
    assert moved.statistics.dtype == torch.float64
    assert torch.equal(moved.statistics, heard)
    assert torch.equal(moved.state_dict()["_extra_state"], heard)


def test_times_follow_what_is_written_into_the_state_dict_and_are_fitted_once(monkeypatch):
    law, source = Information().build(), taught()
    u, calls = torch.rand(100), []
    law.sample_times(u)
    for value in law.state_dict().values():
        value.copy_(source.statistics)
    falling = information._falling
    monkeypatch.setattr(information, "_falling", lambda *pair: calls.append(1) or falling(*pair))
    wanted = source.sample_times(u)
    calls.clear()
    assert torch.equal(law.sample_times(u), wanted)
    made = len(calls)
    law.sample_times(u)
    law.grid(9, 1.0)
    assert 0 < made == len(calls)


def test_falling_means_are_the_smallest_over_starts_of_the_largest_over_ends():
    generator = torch.Generator().manual_seed(0)
    counts = torch.rand(40, generator=generator, dtype=torch.float64) + 0.01
    sums = counts * (torch.randn(40, generator=generator, dtype=torch.float64) - torch.linspace(0, 2, 40))
    mean = {(i, j): float(sums[i:j].sum() / counts[i:j].sum()) for j in range(1, 41) for i in range(j)}
    wanted = [min(max(mean[i, j] for j in range(k + 1, 41)) for i in range(k + 1)) for k in range(40)]
    torch.testing.assert_close(_falling(sums, counts), torch.tensor(wanted, dtype=torch.float64))


def test_a_law_made_for_its_shapes_alone_knows_its_last_time():
    with torch.device("meta"):
        law = Information().build()
    assert law.statistics.device.type == "cpu"
    assert law.grid(1, 1.0) == [0.0]


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
    assert law.statistics[:, 0].tolist() == [6, 6, 36, 36, 36]


@pytest.mark.parametrize(
    "wrong",
    [
        {"knots": 1},
        {"knots": 4097},
        {"memory": 0},
        {"uniform": 0.0},
        {"family": "normal"},
        {"base": {"name": "information"}},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Information.model_validate(wrong)
