"""The components that CONTRIBUTING.md shows obey every law of their kind."""

import re
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from shared_folders import REPOSITORY

from l2d_framework import Component, Guidance, Solver
from l2d_framework.testing import parametrize_with_checks

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text()


def shown():
    """One component of every class that is written out."""
    names = {"replace": replace, "ClassVar": ClassVar, "Literal": Literal, "torch": torch}
    found = {**names, "Guidance": Guidance, "Solver": Solver}
    known = set(found)
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(code, found)
    return [found[name]() for name in found if name not in known and name != "__builtins__"]


@parametrize_with_checks(shown())
def test_what_is_shown_obeys_the_laws(component, check):
    check(component)


def test_a_solver_and_a_guidance_are_shown_and_every_capability_is_explained():
    assert [component.kind for component in shown()] == ["solver", "guidance"]
    for interface in (Solver, Guidance):
        flags = set(vars(interface)) - set(vars(Component)) - {"kind", "model_config", "scale"}
        own = {name for name in flags if not name.startswith("_") and not callable(getattr(interface, name))}
        assert own <= set(re.findall(r"`(\w+)", TEXT)), own
