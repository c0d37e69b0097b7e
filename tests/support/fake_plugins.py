"""Installed distributions that exist only in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import toy_components as toys

from l2d_framework import blame
from l2d_framework.hooks import EXTENSIONS, GROUP, hookimpl
from l2d_framework.registry import catalog


@dataclass(frozen=True)
class FakeEntryPoint:
    """What `importlib.metadata` finds for one plugin of one distribution."""

    name: str
    load: Callable[[], Any]
    distribution: str = ""
    version: str = "1.0"
    value: str = "acme"

    @property
    def dist(self) -> Any:
        return SimpleNamespace(name=self.distribution or f"acme-{self.name}", version=self.version)


def module(**functions: Callable[[], Any]) -> ModuleType:
    """A plugin module with these hook implementations."""
    found = ModuleType("acme")
    for name, function in functions.items():
        setattr(found, name, hookimpl(function))
    return found


def plugin(
    name: str,
    components: Sequence[Any] = (),
    presets: Mapping[str, Any] | None = None,
    methods: Mapping[str, Any] | None = None,
    **dist: str,
) -> FakeEntryPoint:
    """A well-behaved plugin."""
    found = module(
        l2d_components=lambda: components, l2d_presets=lambda: presets or {}, l2d_methods=lambda: methods or {}
    )
    return FakeEntryPoint(name, lambda: found, **dist)


def broken(name: str, error: BaseException) -> FakeEntryPoint:
    """A plugin that fails at import."""

    def load() -> Any:
        raise error

    return FakeEntryPoint(name, load)


class Toy(toys.Projected):
    """A state space with a preset of its own."""

    default_method = "toy"


Toy.module = toys.ProjectedSpace

TOYS = plugin(
    "toys",
    [toys.Circle, Toy, toys.Forward, toys.Doubling, toys.Sharpen, toys.Beside, toys.Canvas, toys.Again],
    {
        "toy-default": {"solver": {"name": "forward"}, "num_inference_steps": 7, "estimate": {"temperature": 0.5}},
        "toy-adaptive": {"solver": {"name": "doubling", "max_evaluations": 99}, "num_inference_steps": None},
        "toy-guided": {"solver": {"name": "forward"}, "num_inference_steps": 3, "guidance": [{"name": "sharpen"}]},
    },
    {
        "toy": {
            "schedule": {"name": "circle"},
            "parametrization": {"name": "projected"},
            "backbone": {"name": "beside"},
            "sampling": {"preset": "toy-default"},
        }
    },
)


def forget_afterwards(patch: pytest.MonkeyPatch) -> None:
    """Let plugins be blamed for no later error in the modules of tests that play them."""
    for known in ("_PACKAGES", "_SHIPPED"):
        patch.setattr(blame, known, {})


@contextmanager
def installed(*entry_points: FakeEntryPoint) -> Iterator[None]:
    """Let this process find exactly these plugins."""
    real = metadata.entry_points

    def found(**query: Any) -> Any:
        if not query:
            return SimpleNamespace(select=found)
        group = query.get("group")
        return list(entry_points) if group == GROUP else [] if group == EXTENSIONS else real(**query)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metadata, "entry_points", found)
            forget_afterwards(patch)
            _forget_plugins()
            yield
    finally:
        _forget_plugins()


def _forget_plugins() -> None:
    catalog._loaded.cache_clear()
    catalog.declared.cache_clear()
