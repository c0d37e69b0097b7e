"""Conformance kit: every law a component must obey, as one function each, for built-ins and plugins alike.

Needs pytest beside the package itself. A plugin's whole test is

    from l2d_framework.testing import parametrize_with_checks

    @parametrize_with_checks([Keyword(), Keyword(scale=5.0)])
    def test_conformance(component, check):
        check(component)

Which laws apply follows from the component's kind and the capabilities it declares, never from its class or name.
"""

from l2d_framework.testing.kit import checks_for, parametrize_with_checks
from l2d_framework.testing.laws import Check
from l2d_framework.testing.scenes import tiny_llama

__all__ = ["Check", "checks_for", "parametrize_with_checks", "tiny_llama"]
