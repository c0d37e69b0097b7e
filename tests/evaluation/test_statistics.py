"""Numbers with their standard errors agree however they are asked for."""

import numpy as np
import pytest
import torch

from l2d_framework.evaluation.statistics import Estimate, exp_of_ratio, mean, ratio, standard_error

VALUES = np.random.default_rng(0).random(23)


def test_the_error_of_a_mean_is_one_number_whichever_way_it_is_computed():
    found = mean(VALUES)
    assert standard_error(VALUES.tolist()) == pytest.approx(found.standard_error)
    assert standard_error([1.0]) is None


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor])
def test_a_ratio_of_sums_over_equal_denominators_is_a_mean(array):
    found, whole = ratio(array(VALUES), array(np.full(23, 2.0))), mean(VALUES / 2)
    assert found.value == pytest.approx(whole.value)
    assert found.standard_error == pytest.approx(whole.standard_error)


def test_the_error_of_an_exponential_is_linearised():
    tiny, plain = exp_of_ratio(1e-6 * VALUES, np.ones(23)), mean(1e-6 * VALUES)
    assert tiny.standard_error == pytest.approx(plain.standard_error, rel=1e-5)


@pytest.mark.parametrize(("value", "error", "is_clear"), [(0.21, 0.1, True), (-0.21, 0.1, True), (0.19, 0.1, False)])
def test_a_number_is_clear_beyond_two_standard_errors(value, error, is_clear):
    assert Estimate(value, error, 9).is_clear == is_clear
    assert not Estimate(value, None, 1).is_clear
