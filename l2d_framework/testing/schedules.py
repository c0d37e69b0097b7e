"""Laws of schedules."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise

import torch
from torch import Tensor, nn

from l2d_framework.schedule import NoiseLaw, ScheduleConfig
from l2d_framework.testing.laws import Check, Laws, ensure, ensure_close


def _of_built(check: Callable[[NoiseLaw], None]) -> Check:
    """A check of a schedule as it is built, and where it learns also after it has heard losses."""

    @wraps(check)
    def checked(config: ScheduleConfig) -> None:
        schedule = config.build()
        check(schedule)
        if isinstance(schedule, nn.Module):
            _tell(schedule)
            check(schedule)

    return checked


law = Laws(_of_built, lambda config: config.build())


def _tell(schedule: NoiseLaw, updates: int = 5) -> None:
    """Losses that fall where half of the signal has come, as far as the numbers that make the times go."""
    for _ in range(updates):
        t = torch.rand(2000, generator=torch.Generator().manual_seed(0))
        schedule.observe(t, 5 * torch.sigmoid(20 * (schedule.sigma(t) - schedule.alpha(t))))


@law
def check_schedule_shapes(schedule: NoiseLaw) -> None:
    """Weights and slopes have the shape and dtype of the time they belong to."""
    for t in (torch.rand(2, 3) * 0.9, torch.tensor(0.5, dtype=torch.float64)):
        values = schedule.alpha(t), schedule.sigma(t), *schedule.derivatives(t)
        for name, value in zip(("alpha", "sigma", "alpha'", "sigma'"), values, strict=True):
            claim = f"{name} of {tuple(t.shape)} {t.dtype} came out as {tuple(value.shape)} {value.dtype}."
            ensure(_is_like(value, t), claim)


@law
def check_schedule_endpoints(schedule: NoiseLaw) -> None:
    """T = 0 is pure noise of the prior's scale and t = 1 is clean."""
    ends = torch.tensor([0.0, 1.0])
    ensure_close(schedule.alpha(ends), ends, "alpha must be 0 at t = 0 and 1 at t = 1", tolerance=1e-3)
    ensure_close(schedule.sigma(ends), 1 - ends, "sigma must be 1 at t = 0 and 0 at t = 1", tolerance=1e-3)


@law
def check_schedule_signal_to_noise_rises(schedule: NoiseLaw) -> None:
    """Alpha never falls, sigma never rises, and their ratio rises all the time."""
    t = _inner_times()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    ensure((alpha.diff() >= 0).all(), f"alpha falls after t = {_first(t, alpha.diff() < 0)}.")
    ensure((sigma.diff() <= 0).all(), f"sigma rises after t = {_first(t, sigma.diff() > 0)}.")
    ratio = alpha / sigma
    ensure((ratio.diff() > 0).all(), f"alpha / sigma does not rise after t = {_first(t, ratio.diff() <= 0)}.")


@law
def check_schedule_derivatives(schedule: NoiseLaw) -> None:
    """`derivatives` are the slopes of `alpha` and `sigma`."""
    t, h = _inner_times(), 1e-3
    for slope, name in zip(schedule.derivatives(t), ("alpha", "sigma"), strict=True):
        weight = getattr(schedule, name)
        central = (weight(t + h) - weight(t - h)) / (2 * h)
        ensure_close(slope, central, f"derivatives must be the slope of {name}", tolerance=2e-3)


@law
def check_schedule_noise_inverts_interpolate(schedule: NoiseLaw) -> None:
    """The noise recovered from a state is the noise that made it."""
    clean, noise, t = _path()
    recovered = schedule.noise(schedule.interpolate(clean, noise, t), clean, t)
    ensure_close(recovered, noise, "noise must undo interpolate")


@law
def check_schedule_velocity_follows_path(schedule: NoiseLaw) -> None:
    """The velocity points along the path, at whatever speed, and is finite from t = 0 on."""
    clean, noise, t = _path()
    h = 1e-4
    slope = (schedule.interpolate(clean, noise, t + h) - schedule.interpolate(clean, noise, t - h)) / (2 * h)
    velocity = schedule.velocity(schedule.interpolate(clean, noise, t), clean, t)
    cosine = torch.nn.functional.cosine_similarity(velocity, slope, dim=-1)
    ensure_close(cosine, torch.ones_like(cosine), "velocity must point along the path", tolerance=1e-3)
    start = torch.zeros_like(t)
    ensure(schedule.velocity(noise, clean, start).isfinite().all(), "velocity is not finite at t = 0.")


@law
def check_schedule_training_times(schedule: NoiseLaw) -> None:
    """Training times of uniform numbers lie in [0, 1], and rise or fall with them all the way."""
    u = _uniform_numbers()
    t = schedule.sample_times(u)
    ensure(_is_like(t, u), f"sample_times changed {u.shape} {u.dtype} to {t.shape} {t.dtype}.")
    outside = (t < 0) | (t > 1) | ~t.isfinite()
    ensure(not outside.any(), f"sample_times gives {t[outside].tolist()[:3]} for u = {u[outside].tolist()[:3]}.")
    ensure(t[-1] != t[0], "sample_times gives the first and the last u the same time.")
    back = t.diff() * (t[-1] - t[0]) < 0
    ensure(not back.any(), f"sample_times turns back after u = {_first(u, back)}.")


@law
def check_schedule_weight(schedule: NoiseLaw) -> None:
    """Weights of the loss are finite at every training time and none is negative."""
    t = schedule.sample_times(_uniform_numbers())
    weight = schedule.weight(t)
    if weight is not None:
        ensure(weight.shape == t.shape, f"weight changed {tuple(t.shape)} to {tuple(weight.shape)}.")
        wrong = (weight < 0) | ~weight.isfinite()
        ensure(not wrong.any(), f"weight gives {weight[wrong].tolist()[:3]} for t = {t[wrong].tolist()[:3]}.")


@law
def check_schedule_noisier(schedule: NoiseLaw) -> None:
    """The time of a first prediction lies in [0, 1], never after the training time it serves and mostly earlier."""
    t = schedule.sample_times(_uniform_numbers())
    noisier = schedule.noisier(t)
    ensure(_is_like(noisier, t), f"noisier changed {t.shape} {t.dtype} to {noisier.shape} {noisier.dtype}.")
    outside = (noisier < 0) | (noisier > 1) | ~noisier.isfinite()
    ensure(not outside.any(), f"noisier leaves [0, 1] for t = {t[outside].tolist()[:3]}.")
    ensure((noisier <= t).all(), f"noisier moves away from the noise at t = {t[noisier > t].tolist()[:3]}.")
    ensure((noisier < t).float().mean() > 0.5, "noisier leaves most times where they are.")


@law
def check_schedule_grid(schedule: NoiseLaw) -> None:
    """A grid has as many times as asked for, rising within [0, 1] to the end asked for."""
    for count in (1, 2, 5, 16):
        for end in (1.0, 0.9):
            times = schedule.grid(count, end)
            ensure(len(times) == count, f"grid({count}, {end}) has {len(times)} times.")
            ensure(all(0 <= t <= 1 for t in times), f"grid({count}, {end}) leaves [0, 1]: {times}.")
            ensure(all(t < s for t, s in pairwise(times)), f"grid({count}, {end}) does not rise: {times}.")
            ensure(count == 1 or abs(times[-1] - end) < 1e-6, f"grid({count}, {end}) ends at {times[-1]}.")


@law.where(lambda schedule: isinstance(schedule, nn.Module))
@torch.no_grad()
def check_schedule_is_its_state_dict(schedule: NoiseLaw) -> None:
    """What a schedule has learned is in its state dict, to the bit, and held-out times do not change with it."""
    other = schedule.config.build()
    assert isinstance(schedule, nn.Module) and isinstance(other, nn.Module)
    u = _uniform_numbers()
    fixed = schedule.fixed_times(u)
    _tell(schedule)
    ensure(torch.equal(schedule.fixed_times(u), fixed), "fixed_times change with what is learned.")
    other.load_state_dict(schedule.state_dict())
    for _ in range(2):
        times, others = (one.sample_times(u).tolist() + one.grid(9, 1.0) for one in (schedule, other))
        ensure(times == others, "Two schedules of one state dict have different times.")
        _tell(schedule, 1)
        _tell(other, 1)


def _uniform_numbers() -> Tensor:
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    return torch.cat([torch.linspace(0, 1, 1001)[:-1], below_one[None]])


def _inner_times() -> Tensor:
    return torch.linspace(0.02, 0.98, 97, dtype=torch.float64)


def _path() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 3, 8, generator=generator, dtype=torch.float64)
    return clean, noise, torch.tensor([[0.05, 0.3, 0.5], [0.6, 0.8, 0.95]], dtype=torch.float64)


def _is_like(value: Tensor, given: Tensor) -> bool:
    return value.shape == given.shape and value.dtype == given.dtype


def _first(t: Tensor, where: Tensor) -> float:
    return float(t[:-1][where][:1].sum())
