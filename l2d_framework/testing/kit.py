"""Which laws a component must obey, and the pytest decorator that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from l2d_framework.component import Component
from l2d_framework.testing import backbones, common, drafters, guidance, parametrizations, schedules, solvers
from l2d_framework.testing.laws import Check

if TYPE_CHECKING:
    import pytest

_BY_KIND = {
    "schedule": schedules.law,
    "parametrization": parametrizations.law,
    "backbone": backbones.law,
    "solver": solvers.law,
    "guidance": guidance.law,
    "drafter": drafters.law,
}


def checks_for(component: object) -> list[Check]:
    """Laws that a component's kind and declared capabilities commit it to.

    Args:
        component: any component.

    Returns:
        The checks, the common ones first.

    Raises:
        TypeError: if it is not an instance of one of the six interfaces.
    """
    if not isinstance(component, Component) or component.kind not in _BY_KIND:
        raise TypeError(f"{component!r} is not a component; pass instances such as Midpoint().")
    return common.law.of(component) + _BY_KIND[component.kind].of(component)


def parametrize_with_checks(components: Sequence[Component]) -> pytest.MarkDecorator:
    """Run a test with the arguments `component` and `check` once for every component and every law it must obey.

    Args:
        components: instances in all configurations worth testing.

    Returns:
        A pytest decorator. A component whose extra is not installed is skipped, saying what to install.
    """
    import pytest

    cases = []
    for component in components:
        changed = component.model_dump(exclude_defaults=True)
        label = f"{type(component).__name__}({', '.join(f'{name}={value}' for name, value in changed.items())})"
        missing = component.missing_requirements()
        if missing:
            skip = pytest.mark.skip(reason=f"{type(component).__name__} needs {missing}; install {component.extra!r}.")
            cases.append(pytest.param(component, None, id=label, marks=skip))
        else:
            cases += [pytest.param(component, c, id=f"{label}-{c.__name__}") for c in checks_for(component)]
    return pytest.mark.parametrize(("component", "check"), cases)
