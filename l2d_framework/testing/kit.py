"""Which laws a component must obey, and the pytest decorator that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from l2d_framework.component import Component
from l2d_framework.testing.backbones import backbone_checks
from l2d_framework.testing.common import component_checks
from l2d_framework.testing.guidance import guidance_checks
from l2d_framework.testing.parametrizations import parametrization_checks
from l2d_framework.testing.schedules import schedule_checks
from l2d_framework.testing.solvers import solver_checks

if TYPE_CHECKING:
    import pytest

Check = Callable[[Any], None]
"""A law: takes a component and raises AssertionError if it is broken."""

_BY_KIND: dict[str, Callable[[Any], Sequence[Check]]] = {
    "schedule": schedule_checks,
    "parametrization": parametrization_checks,
    "backbone": backbone_checks,
    "solver": solver_checks,
    "guidance": guidance_checks,
}


def checks_for(component: object) -> list[Check]:
    """Laws that a component's kind and declared capabilities commit it to.

    Args:
        component: any component.

    Returns:
        The checks, the common ones first.

    Raises:
        TypeError: if it is not an instance of one of the five interfaces.
    """
    if not isinstance(component, Component) or component.kind not in _BY_KIND:
        raise TypeError(f"{component!r} is not a component; pass instances such as Midpoint().")
    return [*component_checks(component), *_BY_KIND[component.kind](component)]


def parametrize_with_checks(components: Sequence[Component]) -> pytest.MarkDecorator:
    """Run a test once for every component and every law it must obey.

    The test takes two arguments and is one line:

        @parametrize_with_checks([Keyword(scale=2.0)])
        def test_conformance(component, check):
            check(component)

    Args:
        components: instances in all configurations worth testing.

    Returns:
        A pytest decorator. A component whose extra is not installed is skipped, saying what to install.
    """
    import pytest

    cases = []
    for component in components:
        missing = component.missing_requirements()
        if missing:
            skip = pytest.mark.skip(reason=f"{type(component).__name__} needs {missing}; install {component.extra!r}.")
            cases.append(pytest.param(component, None, id=_label(component), marks=skip))
        else:
            cases += [pytest.param(component, c, id=f"{_label(component)}-{c.__name__}") for c in checks_for(component)]
    return pytest.mark.parametrize(("component", "check"), cases)


def _label(component: Component) -> str:
    """Class name and the options that were chosen."""
    changed = component.model_dump(exclude_defaults=True)
    return f"{type(component).__name__}({', '.join(f'{name}={value}' for name, value in changed.items())})"
