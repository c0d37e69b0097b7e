import math
from typing import ClassVar

import pytest
import torch
from l2d_multistep import AdamsBashforth2, DPMSolverPP2M

from l2d_framework.testing import parametrize_with_checks
from l2d_framework.testing.solvers import check_solver_order
from l2d_framework.testing.toys import ToyProblem

KEYS = torch.arange(3)[None]
X = torch.tensor([[[1.0, -2.0], [0.5, 3.0], [-1.0, 0.0]]], dtype=torch.float64)


@parametrize_with_checks([DPMSolverPP2M(), AdamsBashforth2()])
def test_conformance(component, check):
    check(component)


@pytest.mark.parametrize("solver", [DPMSolverPP2M, AdamsBashforth2])
def test_no_higher_order_can_be_declared(solver):
    class Boastful(solver):
        order: ClassVar[int] = 3

    with pytest.raises(AssertionError, match="Order 3 is declared"):
        check_solver_order(Boastful())


def clean(x, t, key):
    return x.square() - t * key


def test_it_takes_the_steps_of_algorithm_2():
    # On straight paths, alpha = t and sigma = 1 - t.
    times = [0.2, 0.5, 0.6, 0.9]
    lambdas = [math.log(t / (1 - t)) for t in times]
    problem, x, earlier = ToyProblem(clean, KEYS), X, None
    for i in (1, 2, 3):
        h, t, s = lambdas[i] - lambdas[i - 1], times[i - 1], times[i]
        estimate = problem.clean(x, t)
        r = math.inf if earlier is None else (lambdas[i - 1] - lambdas[i - 2]) / h
        d = (1 + 1 / (2 * r)) * estimate - 1 / (2 * r) * (estimate if earlier is None else earlier)
        x = (1 - s) / (1 - t) * x - s * math.expm1(-h) * d
        earlier = estimate
    torch.testing.assert_close(DPMSolverPP2M().solve(ToyProblem(clean, KEYS), X, times), x)


def test_steps_that_are_endless_in_lambda_are_those_of_ddim():
    def solved(times):
        return DPMSolverPP2M().solve(ToyProblem(clean, KEYS), X, times)

    problem = ToyProblem(clean, KEYS)
    half = 0.5 * problem.clean(X, 0.0) + 0.5 * X
    torch.testing.assert_close(solved([0.0, 0.5]), half)
    torch.testing.assert_close(solved([0.0, 0.5, 1.0]), problem.clean(half, 0.5))
    later = 0.75 * problem.clean(half, 0.5) + 0.5 * (half - 0.5 * problem.clean(half, 0.5))
    torch.testing.assert_close(solved([0.0, 0.5, 0.75]), later)


def test_a_slope_that_rises_evenly_is_followed_exactly_after_the_first_step():
    class Rising(ToyProblem):
        def velocity(self, x, t, *, active=None):
            return torch.full_like(x, 2 * t)

    end = AdamsBashforth2().solve(Rising(clean, KEYS), X, [0.0, 0.1, 0.4, 0.9])
    torch.testing.assert_close(end, X + 0.9**2 - 0.1**2)
