"""Registry: finds plugins through the entry-point group `l2d_framework` and answers for what they offer.

This package imports no torch; loading plugins usually does.
"""

from l2d_framework.registry.catalog import ALLOW_LIST, BrokenPlugin, PluginRow, Registry, declared, extensions, registry
from l2d_framework.registry.offers import DECLARED, INTERFACES, Source

__all__ = [
    "ALLOW_LIST",
    "DECLARED",
    "INTERFACES",
    "BrokenPlugin",
    "PluginRow",
    "Registry",
    "Source",
    "declared",
    "extensions",
    "registry",
]
