"""lm_eval's own command line, with the model `l2d` in its table whether or not the start-up hook is there."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from l2d_framework.errors import ConfigError, DataError, PluginError
from l2d_framework.evaluation.start_up import steps

_UNREACHED = re.compile(r"Couldn't reach '([^']+)' on the Hub")
_SUBCOMMANDS = ("run", "ls", "validate")


def run(arguments: Sequence[str]) -> None:
    """Run lm_eval; its model is `l2d` unless the arguments name another.

    Args:
        arguments: as `lm_eval` takes them.

    Raises:
        PluginError: if lm_eval is not installed.
        ConfigError: if no checkpoint is named.
        DataError: if the data of a task cannot be reached.
        ConnectionError: if something else cannot.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise PluginError("Evaluation needs lm_eval. Run: pip install 'l2d-framework[eval]'")
    asked = list(arguments)
    evaluates = bool(asked) and asked[0] not in ("ls", "validate", "-h", "--help") and asked[1:] != ["--help"]
    if evaluates and not any(a in ("--model", "-M", "-C", "--config") or a.startswith("--model=") for a in asked):
        asked = [*asked[:1], "--model", "l2d", *asked[1:]] if asked[0] == "run" else ["--model", "l2d", *asked]
    if steps.lacks_checkpoint(asked, os.environ):
        raise ConfigError(steps.MISSING)
    if evaluates and asked[0] not in _SUBCOMMANDS:
        asked = ["run", *asked]

    import lm_eval.models  # noqa: F401 -- fills the table that the next line adds to
    from lm_eval.__main__ import cli_evaluate

    steps.register()
    sys.argv = ["lm_eval", *asked]
    try:
        cli_evaluate()
    except ConnectionError as error:
        if found := _UNREACHED.search(str(error)):
            raise DataError(
                f"The data set {found[1]!r} cannot be reached ({error}). Go online once, or give it as the folder "
                f"{str(Path(found[1]).resolve())!r}: a folder named like a data set is read instead of the hub."
            ) from error
        raise
