"""Options of rows, checked against the runs they belong to before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l2d_framework.benchmark.references import references, replaced
from l2d_framework.errors import ConfigError, L2DError


def is_plain(run: Mapping[str, Any]) -> bool:
    """Whether a run makes a plain language model.

    Args:
        run: its fields; none of a published model.

    Returns:
        True for one of kind `language_model`.
    """
    return run.get("kind") == "language_model"


def check_options(options: Mapping[str, Any], run: Mapping[str, Any], where: str) -> None:
    """Refuse options that the adapter does not know or the run's model cannot follow.

    Args:
        options: arguments of the adapter.
        run: fields of the run; none of a published model, whose own settings are not known here.
        where: the row, for messages.

    Raises:
        ConfigError: naming the row.
    """
    from l2d_framework.config import DiffusionRun
    from l2d_framework.config.parsing import parse_run
    from l2d_framework.config.sampling import SamplingSection
    from l2d_framework.evaluation.lm_eval.options import check_model_options

    try:
        check_model_options(options)
        if run.get("kind", "diffusion") != "diffusion" or not run:
            return
        parsed = parse_run(replaced(dict(run), lambda found: found.key))
        if isinstance(parsed, DiffusionRun):
            fields = {name: value for name, value in options.items() if name in SamplingSection.model_fields}
            if not list(references(fields)):
                parsed.sampling.resolve(parsed.parametrization, fields)
    except L2DError as error:
        raise ConfigError(f"{where}: {error}") from error
