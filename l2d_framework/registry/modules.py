"""Modules that every plugin shares and none may replace."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from l2d_framework.errors import PluginError

_SHARED = {*sys.stdlib_module_names, "l2d_framework", "l2d_plugins"} - {"distutils"}
"""Packages; setuptools may stand for distutils."""
_LIBRARIES = ("torch", "transformers", "pydantic", "pluggy", "numpy")
_STANDARD = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib")]


@contextmanager
def untouched_modules() -> Iterator[None]:
    """Put shared modules back that a plugin's import replaces, so that the blame is not on whoever uses them next."""
    before = {name: module for name, module in list(sys.modules.items()) if _is_shared(name)}
    path = list(sys.path)
    try:
        yield
    finally:
        replaced = [name for name, module in before.items() if sys.modules.get(name) is not module]
        shadows = [name for name in {*sys.modules} - before.keys() if _is_shadow(name, sys.modules[name])]
        if replaced or shadows:
            sys.modules.update(before)
            for name in shadows:
                del sys.modules[name]
            sys.path[:] = path
            names = ", ".join(map(repr, sorted(replaced + shadows)))
            raise PluginError(f"It replaces modules that others rely on: {names}. They were put back.")


def _is_shared(name: str) -> bool:
    return name in _LIBRARIES or name.partition(".")[0] in _SHARED


def _is_shadow(name: str, module: ModuleType | None) -> bool:
    """Whether a new module bears the name of a standard one and is another."""
    if name not in _SHARED or name.startswith("l2d_"):
        return False
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    if origin is None or origin in ("built-in", "frozen"):
        return origin is None
    here = Path(origin)
    is_standard = any(here.is_relative_to(folder) for folder in _STANDARD) and "site-packages" not in here.parts
    return not is_standard and ".zip" not in origin
