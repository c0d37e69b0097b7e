"""lm_eval's own command line, with the model `l2d` in its table whether or not the start-up hook is there."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l2d_framework.errors import ConfigError, PluginError, install
from l2d_framework.evaluation.harness.errors import explain
from l2d_framework.evaluation.harness.start_up import steps
from l2d_framework.registry import extensions

ALLOW_NETWORK = "--allow-network-in-sandbox"
"""Option that lm_eval does not have; `L2D_ALLOW_NETWORK_IN_SANDBOX=1` says the same to its own command."""


def run(arguments: Sequence[str]) -> None:
    """Run lm_eval; its model is `l2d` unless the arguments name another."""
    if importlib.util.find_spec("lm_eval") is None:
        raise PluginError(f"Evaluation needs lm_eval. Run: {install('l2d-framework[eval]')}")
    asked = [argument for argument in arguments if argument != ALLOW_NETWORK]
    if len(asked) < len(arguments):
        os.environ["L2D_ALLOW_NETWORK_IN_SANDBOX"] = "1"
    evaluates = bool(asked) and asked[0] not in ("ls", "validate", "-h", "--help") and asked[1:] != ["--help"]
    if evaluates and not any(a in ("--model", "-M", "-C", "--config") or a.startswith("--model=") for a in asked):
        asked = [*asked[:1], "--model", "l2d", *asked[1:]] if asked[0] == "run" else ["--model", "l2d", *asked]
    if steps.lacks_checkpoint(asked, os.environ):
        raise ConfigError(steps.MISSING)
    if evaluates and asked[0] != "run":
        asked = ["run", *asked]

    import lm_eval.models  # noqa: F401 -- fills the table that the next line adds to
    from lm_eval.__main__ import cli_evaluate

    steps.register()
    if steps.named_model(asked) == "l2d":
        steps.prepare(asked)
    sys.argv = ["lm_eval", *asked]
    try:
        with _with_tasks(extensions().task_folders()):
            cli_evaluate()
    except Exception as error:
        known = explain(error)
        if known is None or known is error:
            raise
        raise known from error


@contextmanager
def _with_tasks(folders: Sequence[Path]) -> Iterator[None]:
    """Let lm_eval's command line know the plugins' tasks beside its own and those of `--include_path`, which win."""
    from lm_eval import tasks

    manager: Any = tasks.TaskManager

    def with_plugins(verbosity: Any = None, include_path: Any = None, *args: Any, **options: Any) -> Any:
        given = include_path if isinstance(include_path, list | tuple) else [include_path] if include_path else []
        return manager(verbosity, [*map(str, folders), *given], *args, **options)

    tasks.TaskManager = with_plugins
    try:
        yield
    finally:
        tasks.TaskManager = manager
