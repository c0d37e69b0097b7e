"""The kit accepts correct components and catches, for each of its laws, one that breaks it."""

from typing import Literal

import pytest
from broken_backbones import BROKEN as BROKEN_BACKBONES
from broken_components import BROKEN as BROKEN_COMPONENTS
from toy_components import CORRECT, Doubling, Forward, Sharpen

from l2d_framework.solver import Solver
from l2d_framework.testing import (
    backbones,
    checks_for,
    common,
    drafters,
    guidance,
    parametrizations,
    parametrize_with_checks,
    schedules,
    solvers,
)

BROKEN = [*BROKEN_COMPONENTS, *BROKEN_BACKBONES]
MODULES = [common, schedules, parametrizations, backbones, solvers, guidance, drafters]
LAWS = {law for module in MODULES for name, law in vars(module).items() if name.startswith("check_")}


@parametrize_with_checks(CORRECT)
def test_correct_components_obey_every_law(component, check):
    check(component)


@pytest.mark.parametrize(
    ("check", "component", "message"), BROKEN, ids=[f"{c.__name__}-{type(b).__name__}" for c, b, _ in BROKEN]
)
def test_a_broken_law_is_caught_by_its_check(check, component, message):
    assert check in checks_for(component)
    with pytest.raises(AssertionError, match=message):
        check(component)


def test_every_law_has_a_component_that_breaks_it():
    assert {check for check, _, _ in BROKEN} == LAWS


def test_every_law_is_selected_for_some_correct_component():
    assert {check for component in CORRECT for check in checks_for(component)} == LAWS


def test_capabilities_select_the_laws():
    assert solvers.check_solver_order in checks_for(Forward())
    assert solvers.check_solver_order not in checks_for(Doubling())
    assert solvers.check_solver_budget in checks_for(Doubling())
    assert solvers.check_solver_budget not in checks_for(Forward())

    class Coupled(Forward):
        batch_coupled = True

    class Scaleless(Sharpen):
        neutral_scale = None

    assert solvers.check_solver_tokens_are_independent not in checks_for(Coupled())
    assert guidance.check_guidance_is_neutral not in checks_for(Scaleless())


class Classical(Solver):
    """The classical Runge-Kutta method, in several steps for one."""

    name: Literal["classical"] = "classical"
    parts: int
    claim: int

    @property
    def order(self):
        return self.claim

    def step(self, problem, x, t, s):
        h = (s - t) / self.parts
        for i in range(self.parts):
            now = t + i * h
            k1 = problem.velocity(x, now)
            k2 = problem.velocity(x + h / 2 * k1, now + h / 2)
            k3 = problem.velocity(x + h / 2 * k2, now + h / 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + problem.velocity(x + h * k3, now + h))
        return x


def test_a_solver_may_be_better_than_its_order_and_never_worse():
    for better in (Classical(parts=1, claim=2), Classical(parts=4, claim=9)):
        solvers.check_solver_order(better)
    with pytest.raises(AssertionError, match=r"Order 5 is declared, 4\.0"):
        solvers.check_solver_order(Classical(parts=1, claim=5))


@pytest.mark.parametrize("wrong", [Forward, "forward", 3])
def test_what_is_no_component_is_refused(wrong):
    with pytest.raises(TypeError, match="pass instances"):
        checks_for(wrong)


def test_a_component_without_its_extra_is_skipped_saying_what_to_install():
    class Distant(Forward):
        requires = ("no_such_module",)
        extra = "acme[distant]"

    (case,) = parametrize_with_checks([Distant()]).args[1]
    (mark,) = case.marks
    assert mark.name == "skip"
    assert "acme[distant]" in mark.kwargs["reason"]


def test_identifiers_name_the_options_and_the_law():
    ids = [case.id for case in parametrize_with_checks([Sharpen(scale=2.0)]).args[1]]
    assert "Sharpen(scale=2.0)-check_guidance_is_neutral" in ids
