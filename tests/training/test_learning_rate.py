import math

import pytest

from l2d_framework.config import TrainingSection
from l2d_framework.training.arguments import learning_rate


def rates(steps: int, **fields: object) -> list[float]:
    training = TrainingSection.model_validate({"learning_rate": 1e-4, "final_learning_rate": 1e-6, **fields})
    return [learning_rate(training, step, steps) for step in range(steps)]


def test_logarithmic_warm_up_follows_the_authors_formula() -> None:
    found = rates(1000, warmup_steps=100)
    for step in (0, 1, 10, 50, 99):
        assert found[step] == pytest.approx(1e-6 + (1e-4 - 1e-6) * math.log(step + 1) / math.log(100))


@pytest.mark.parametrize("warmup", ["log", "linear"])
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_rates_rise_to_the_peak_and_fall_to_the_final_rate(warmup: str, decay: str) -> None:
    found = rates(50, warmup_steps=10, warmup=warmup, decay=decay)
    assert found[:10] == sorted(found[:10])
    assert found[9] == found[10] == pytest.approx(1e-4)
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] == pytest.approx(1e-6)


def test_linear_decay_is_halfway_in_the_middle() -> None:
    assert rates(11, warmup_steps=0)[5] == pytest.approx((1e-4 + 1e-6) / 2)


def test_a_constant_rate_stays_at_the_peak() -> None:
    assert rates(20, warmup_steps=5, decay="constant")[5:] == [1e-4] * 15


@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 1), (1, 1), (1, 2), (5, 3), (5, 5)])
def test_short_runs_have_rates_in_range(warmup_steps: int, steps: int) -> None:
    assert all(1e-6 <= rate <= 1e-4 for rate in rates(steps, warmup_steps=warmup_steps))


def test_a_share_of_the_updates_takes_the_place_of_a_number() -> None:
    assert rates(101, warmup_ratio=0.03) == rates(101, warmup_steps=4)
