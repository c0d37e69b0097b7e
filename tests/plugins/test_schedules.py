import math

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from l2d_framework.schedule import Schedule
from l2d_plugins.schedules import l2d_components
from l2d_plugins.schedules.linear import Linear

T = torch.linspace(0, 0.98, 50).reshape(5, 10)
BELOW_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))


def states():
    x, clean = torch.randn(2, 5, 10, 3)
    return 64 * x, clean


def test_the_schedule_is_offered_under_its_name():
    assert [c.component_name() for c in l2d_components()] == ["linear"]


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


def test_golden_cosmap_times(golden_dir):
    file = golden_dir / "l2d" / "functions.safetensors"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    golden = load_file(file)
    torch.testing.assert_close(Linear(times="cosmap").sample_times(golden["cosmap.u"]), golden["cosmap.t"])


@pytest.mark.parametrize(
    "wrong", [{"minimum_noise": 1.0}, {"minimum_noise": -0.1}, {"times": "cosine"}, {"velocity_scaling": "x"}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Linear(**wrong)
