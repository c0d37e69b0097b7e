"""What the start-up hook does once lm_eval is imported; imports nothing but the standard library."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence

PRETRAINED = "L2D_PRETRAINED"
"""Environment variable that names the checkpoint."""

MISSING = (
    f"The model 'l2d' needs a checkpoint. Name it as --model_args pretrained=PATH, or set the environment variable "
    f"{PRETRAINED}=PATH."
)
CONFIRMED = "--confirm_run_unsafe_code"
"""Option of lm_eval by which a user agrees to run programs that the model writes."""


def register() -> None:
    """Add `l2d` to lm_eval's table of models, as text: nothing that needs torch is imported."""
    from lm_eval.api.registry import model_registry

    if "l2d" not in model_registry:
        model_registry.register("l2d", target="l2d_framework.evaluation.harness.model:L2DLM")


def named_model(arguments: Sequence[str]) -> str | None:
    """The last `--model` that arguments of lm_eval name, or None."""
    return _last(arguments, "--model", "-M")


def _last(arguments: Sequence[str], name: str, short: str) -> str | None:
    values = [value for option, value in itertools.pairwise(arguments) if option in (name, short)]
    values += [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{name}=")]
    return values[-1] if values else None


def lacks_checkpoint(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether a command asks for `l2d` and names no checkpoint; False where a configuration file may."""
    told = any(a in ("-C", "--config") or "pretrained" in a or a.startswith("--config=") for a in arguments)
    return named_model(arguments) == "l2d" and not told and not environ.get(PRETRAINED)


def check_command() -> None:
    """Prepare lm_eval's command line where it asks for `l2d`; end it here if no checkpoint is named."""
    if not sys.argv or os.path.basename(sys.argv[0]) not in ("lm_eval", "lm-eval", "__main__.py"):
        return
    if lacks_checkpoint(sys.argv[1:], os.environ):  # before thousands of task files are read
        sys.stderr.write(f"Error: {MISSING}\n")
        raise SystemExit(2)
    if named_model(sys.argv[1:]) == "l2d":
        prepare(sys.argv[1:])


def prepare(arguments: Sequence[str]) -> None:
    """Make code tasks use the sandbox, and errors that a user can cause end in one line."""
    from l2d_framework.evaluation.code.metric import serve
    from l2d_framework.evaluation.harness.errors import show_errors

    show_errors()
    if CONFIRMED in arguments or _is_confirmed_in_file(arguments):
        # The metric's own consent; the user has just given it, in lm_eval's words.
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    serve()


def _is_confirmed_in_file(arguments: Sequence[str]) -> bool:
    import yaml

    if (path := _last(arguments, "--config", "-C")) is None:
        return False
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file).get(CONFIRMED.removeprefix("--")) is True
    except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError):
        return False  # lm_eval says what is wrong with the file
