"""Tells lm_eval of the model `l2d`, until all its releases find entry points themselves.

Runs at every start of Python: imports nothing that Python has not, costs a fraction of a millisecond, and never fails.
`L2D_NO_LM_EVAL_HOOK=1` switches it off.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _step(name: str) -> None:
    try:
        from l2d_framework.evaluation.harness.start_up import steps

        getattr(steps, name)()
    except Exception:
        pass


class _Finder:
    """First on sys.meta_path; finds nothing itself and adds a step to two imports."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name == "lm_eval.evaluator":
            _step("check_command")
        if name != "lm_eval.models":
            return None
        try:
            from importlib.machinery import PathFinder

            spec = PathFinder.find_spec(name, path, target)
            if spec is None or spec.loader is None:
                return None
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                # lm_eval.models fills the table of models and only does so while that is empty, so `l2d` comes after.
                execute(module)
                _step("register")

            loader.exec_module = exec_module
            return spec
        except Exception:
            return None


def install() -> None:
    """Wait for lm_eval; does nothing when it is never imported."""
    try:
        if os.environ.get("L2D_NO_LM_EVAL_HOOK") == "1":
            return
        if "lm_eval.models" in sys.modules:
            _step("register")
        elif _Finder not in sys.meta_path:
            sys.meta_path.insert(0, _Finder)
    except Exception:
        pass
