import math

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from l2d_framework.schedule import Schedule
from l2d_plugins.schedules import l2d_components
from l2d_plugins.schedules.cosine import Cosine
from l2d_plugins.schedules.linear import Linear

T = torch.linspace(0, 0.98, 50).reshape(5, 10)
BELOW_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))


def states():
    x, clean = torch.randn(2, 5, 10, 3)
    return 64 * x, clean


def test_the_schedules_are_offered_under_their_names():
    assert {c.component_name() for c in l2d_components()} == {"linear", "cosine", "information"}


def test_the_path_runs_from_noise_to_data():
    noise, clean = states()
    assert torch.equal(Linear().interpolate(clean, noise, torch.zeros(5, 10)), noise)
    assert torch.equal(Linear().interpolate(clean, noise, torch.ones(5, 10)), clean)


def test_closed_form_derivatives_are_those_of_automatic_differentiation():
    for law, derivative in zip((Linear().alpha, Linear().sigma), Linear().derivatives(T), strict=True):
        t = T.clone().requires_grad_()
        (automatic,) = torch.autograd.grad(law(t).sum(), t)
        assert torch.equal(derivative, automatic)


def test_velocity_is_that_of_the_general_formula():
    x, clean = (v.double() for v in states())
    t = T.double()
    torch.testing.assert_close(Linear().velocity(x, clean, t), Schedule.velocity(Linear(), x, clean, t))


def test_velocity_is_the_distance_left_over_the_time_left():
    x, clean = states()
    assert torch.equal(Linear().velocity(x, clean, T), (clean - x) / (1 - T[..., None]))


def test_edm_velocity_is_the_constant_one_over_the_time_left():
    x, clean = states()
    edm = Linear(velocity_scaling="edm").velocity(x, clean, T)
    torch.testing.assert_close(edm, Linear().velocity(x, clean, T) / (1 - T[..., None]))


def test_velocity_along_a_path_is_constant():
    noise, clean = (v.double() for v in states())
    x = Linear().interpolate(clean, noise, T.double())
    torch.testing.assert_close(Linear().velocity(x, clean, T.double()), clean - noise)


def test_uniform_times_are_the_numbers_themselves():
    assert torch.equal(Linear().sample_times(T), T)


def test_cosmap_times_are_the_angle_of_the_signal_to_noise_ratio():
    u = torch.linspace(0, 0.999, 100, dtype=torch.float64)
    t = Linear(times="cosmap").sample_times(u)
    torch.testing.assert_close(torch.atan2(t, 1 - t), u * math.pi / 2)


@pytest.mark.parametrize("times", ["uniform", "cosmap"])
@pytest.mark.parametrize("minimum_noise", [0.0, 0.1])
def test_training_times_never_reach_the_data(times, minimum_noise):
    t = Linear(times=times, minimum_noise=minimum_noise).sample_times(torch.stack([torch.tensor(0.0), BELOW_ONE]))
    assert t[0] == 0
    assert 1 - minimum_noise - 1e-6 < t[1] < 1 - minimum_noise + 1e-7
    assert t[1] < 1


def test_golden_cosmap_times(golden_file):
    golden = load_file(golden_file("l2d/functions.safetensors"))
    torch.testing.assert_close(Linear(times="cosmap").sample_times(golden["cosmap.u"]), golden["cosmap.t"])


@pytest.mark.parametrize(
    "wrong", [{"minimum_noise": 1.0}, {"minimum_noise": -0.1}, {"times": "cosine"}, {"velocity_scaling": "x"}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Linear(**wrong)


def test_the_cosine_law_is_the_authors_table_of_any_length_read_at_its_own_points():
    u = torch.arange(5000, dtype=torch.float64) / 5000
    abar = (((u + 1e-4) / 1.0001) * (math.pi / 2)).cos() ** 2 / math.cos(1e-4 / 1.0001 * math.pi / 2) ** 2
    torch.testing.assert_close(Cosine().alpha(1 - u) ** 2, abar, rtol=1e-6, atol=0)


def test_signal_and_noise_of_the_cosine_law_share_a_variance_of_one():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    total = Cosine().alpha(t) ** 2 + Cosine().sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=3e-7)


def test_the_cosine_law_has_no_noise_at_all_at_the_data():
    one = torch.tensor([1.0])
    assert Cosine().sigma(one) == 0
    assert Cosine().alpha(one) == 1


def test_cosine_training_times_are_the_points_of_the_table_the_data_first():
    found = Cosine(steps=4).sample_times(torch.tensor([0.0, 0.24, 0.25, 0.6, 0.99, float(BELOW_ONE)]))
    assert found.tolist() == [1.0, 1.0, 0.75, 0.5, 0.25, 0.25]
    u = torch.rand(4000)
    counts = torch.bincount((4 * Cosine(steps=4).sample_times(u)).long())
    assert counts[0] == 0
    assert (counts[1:] > 900).all()
    assert torch.equal(Cosine(steps=None).sample_times(T), 1 - T)


@pytest.mark.parametrize("steps", [1, 3, 50, 5000])
def test_the_noisier_time_is_the_next_point_of_the_table_the_last_its_own(steps):
    index = torch.arange(steps)
    t = 1 - index / steps
    wanted = 1 - (index + 1).clamp_max(steps - 1) / steps
    assert torch.equal(Cosine(steps=steps).noisier(t), wanted)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(steps=None)])
def test_without_a_table_the_noisier_time_is_a_thousandth_nearer_to_the_noise(schedule):
    found = schedule.noisier(torch.tensor([1.0, 0.5, 0.0005, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.999, 0.499, 0.0, 0.0]))


@pytest.mark.parametrize("end", [1.0, 0.8])
def test_cosine_sampling_starts_one_step_from_the_noise_and_takes_equal_steps(end):
    assert Cosine().grid(4, end) == [end / 4, end / 2, 3 * end / 4, end]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1.5}, {"offset": 1e-4}])
def test_cosine_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Cosine(**wrong)
