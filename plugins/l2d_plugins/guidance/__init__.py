"""Guidance methods."""

from __future__ import annotations

from l2d_framework.component import Component
from l2d_framework.hooks import hookimpl
from l2d_plugins.guidance.classifier_free import ClassifierFree
from l2d_plugins.guidance.reward_gradient import RewardGradient


@hookimpl
def l2d_components() -> list[type[Component]]:
    """Guidance methods of this package."""
    return [ClassifierFree, RewardGradient]
