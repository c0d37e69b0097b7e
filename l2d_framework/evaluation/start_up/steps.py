"""What the start-up hook does once lm_eval is imported; imports nothing but the standard library."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

TARGET = "l2d_framework.evaluation.lm_eval.adapter:L2DLM"
PRETRAINED = "L2D_PRETRAINED"
"""Environment variable that names the checkpoint."""

MISSING = (
    f"The model 'l2d' needs a checkpoint. Name it as --model_args pretrained=PATH, or set the environment variable "
    f"{PRETRAINED}=PATH."
)
_PROGRAMS = ("lm_eval", "lm-eval", "__main__.py")


def register() -> None:
    """Add `l2d` to lm_eval's table of models, as text: nothing that needs torch is imported."""
    from lm_eval.api.registry import model_registry

    if "l2d" not in model_registry:
        model_registry.register("l2d", target=TARGET)


def lacks_checkpoint(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether a command line of lm_eval asks for `l2d` and says nowhere which checkpoint.

    Args:
        arguments: of the program, its name left out.
        environ: environment variables.

    Returns:
        True if neither the command line nor the environment can name one; False where a configuration file may.
    """
    models = [arguments[i + 1] for i, name in enumerate(arguments[:-1]) if name in ("--model", "-M")]
    models += [argument.partition("=")[2] for argument in arguments if argument.startswith("--model=")]
    told = any("pretrained" in argument for argument in arguments) or bool(environ.get(PRETRAINED))
    filed = any(argument in ("-C", "--config") or argument.startswith("--config=") for argument in arguments)
    return models[-1:] == ["l2d"] and not told and not filed


def check_command() -> None:
    """End lm_eval's command line before it reads thousands of task files, where it asks for `l2d` without a checkpoint.

    Raises:
        SystemExit: then.
    """
    if sys.argv and os.path.basename(sys.argv[0]) in _PROGRAMS and lacks_checkpoint(sys.argv[1:], os.environ):
        sys.stderr.write(f"Error: {MISSING}\n")
        raise SystemExit(2)
