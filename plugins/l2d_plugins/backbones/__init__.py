"""Built-in backbones."""

from l2d_framework.component import Component
from l2d_framework.hooks import hookimpl
from l2d_plugins.backbones.in_place import InPlaceConfig
from l2d_plugins.backbones.two_stream import TwoStreamConfig


@hookimpl
def l2d_components() -> list[type[Component]]:
    """Offer the backbones of this folder."""
    return [InPlaceConfig, TwoStreamConfig]
