"""Built-in parametrizations."""

from l2d_framework.component import Component
from l2d_framework.hooks import hookimpl
from l2d_plugins.parametrizations.embedding import EmbeddingConfig
from l2d_plugins.parametrizations.simplex import SimplexConfig


@hookimpl
def l2d_components() -> list[type[Component]]:
    """Offer the state spaces of this folder."""
    return [EmbeddingConfig, SimplexConfig]
