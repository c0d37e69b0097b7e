"""Drafters."""

from __future__ import annotations

from l2d_framework.component import Component
from l2d_framework.hooks import hookimpl
from l2d_plugins.drafters.assistant import Assistant
from l2d_plugins.drafters.prompt_lookup import PromptLookup


@hookimpl
def l2d_components() -> list[type[Component]]:
    """Drafters of this package."""
    return [Assistant, PromptLookup]
