"""Options of rows, checked against the runs they belong to before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l2d_bench.references import references, replaced
from l2d_framework.errors import ConfigError, L2DError


def resolved_options(options: Mapping[str, Any], run: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options with nothing left to a run's own settings, so that equal settings have equal results.

    Args:
        options: arguments of the adapter.
        run: fields of the run; none of a published model, whose own settings are not known here.
        where: the row, for messages.

    Returns:
        The options; for a diffusion run those of sampling stand complete under `sampling`.

    Raises:
        ConfigError: if the adapter does not know an option or the run's model cannot follow it.
    """
    from l2d_framework.config import DiffusionRun
    from l2d_framework.config.parsing import parse_run
    from l2d_framework.config.sampling import SamplingSection
    from l2d_framework.evaluation.harness.options import check_model_options

    try:
        check_model_options(options)
        parsed = parse_run(replaced(dict(run), lambda found: found.key)) if run else None
        fields = {name: value for name, value in options.items() if name in SamplingSection.model_fields}
        if not isinstance(parsed, DiffusionRun) or list(references(fields)):
            return dict(options)
        sampling = parsed.sampling.resolve(parsed.parametrization, fields).model_dump(mode="json")
    except L2DError as error:
        raise ConfigError(f"{where}: {error}") from error
    return {name: value for name, value in options.items() if name not in fields} | {"sampling": sampling}
