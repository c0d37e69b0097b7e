"""`l2d eval-steps`: do evaluations pay?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2d_framework.cli import common, held_out
from l2d_framework.errors import ConfigError

if TYPE_CHECKING:
    from l2d_framework.config import SamplingSection
    from l2d_framework.models.unloaded import UnloadedModel
    from l2d_framework.solver import Solver

_STEPS = "0,1,2,3,5,7,15,31"


def eval_steps(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id; also a plain language model.")],
    data: held_out.Data,
    name: held_out.Name = None,
    split: held_out.Split = "train",
    columns: held_out.Columns = None,
    class_column: held_out.ClassColumn = None,
    limit: held_out.Limit = 500,
    max_length: held_out.MaxLength = None,
    num_inference_steps: Annotated[
        str, typer.Option(metavar="N,...", help="Network evaluations per token; 0 for the plain language model.")
    ] = _STEPS,
    solver: Annotated[
        list[str] | None, typer.Option(help="Name of a solver; may be repeated. The model's own, if not given.")
    ] = None,
    set_: common.Settings = None,
    seed: held_out.Seed = None,
    batch_size: held_out.BatchSize = 8,
    base: common.Base = None,
    dtype: common.Dtype = None,
    device: common.Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the numbers and a picture.")] = None,
) -> None:
    """Do evaluations pay? Accuracy and likelihood of held-out tokens after each number of evaluations.

    All tokens of a text are solved at once with the true tokens before them given, so that a hundred thousand tokens
    cost little and differences of a few tenths of a percent are seen. A plain language model, such as one trained with
    LoRA, is measured on the same tokens; numbers of two models are compared row by row in the files written.
    """
    from l2d_framework.cli.meter import Meter
    from l2d_framework.models.unloaded import UnloadedModel
    from l2d_framework.training.output_dir import staged

    common.check_dtype(dtype)
    where = common.check_device(device)
    common.check_folder(out, "--out")
    source = UnloadedModel(model, base=base, dtype=dtype)
    settings = _settings(source, solver or [None], num_inference_steps, partial(common.sampling, set_, seed=seed))
    rows = held_out.Rows(data, name, split, columns, class_column, limit, max_length)
    for sampling in settings:
        rows.check(source, sampling)
    prepared, card = rows.read(source)

    from l2d_framework.evaluation.diagnosis import steps

    common.quieten()
    with Meter(f"loading {model}"):
        lm = source.load(where)
    with Meter("solving", "batches") as meter:
        result = steps.eval_steps(lm, prepared, settings, batch_size=batch_size, track=meter.track)
    title = f"Held-out tokens, the true ones before given; {result['tokens']:,} tokens of {result['rows']:,} rows"
    common.show(steps.table(result), steps.sentences(result), title=title)
    if out is not None:
        facts = {"model": source.identity(), "sampling": settings[-1].model_dump(mode="json"), "data": card}
        with staged(out) as folder:
            common.write_json(folder / "steps.json", result | facts | {"device": str(where)})
            if common.can_draw():
                steps.draw(result, folder / "steps.png")
        typer.echo(f"Written to {out}", err=True)


def _settings(source: UnloadedModel, solvers: Sequence[str | None], steps: str, options: Any) -> list[SamplingSection]:
    """The plain language model, where it was asked for, and of each solver the numbers of evaluations it can make."""
    try:
        counts = sorted({int(count) for count in steps.split(",")})
    except ValueError:
        counts = [-1]
    if counts[0] < 0:
        raise ConfigError(f"--num-inference-steps {steps!r} must be whole numbers with commas, such as 0,1,3,15.")
    settings = []
    if counts == [0] or (counts[0] == 0 and source.empty.identity_at_zero):
        settings.append(source.sampling(options(None, num_inference_steps=0)))
    if source.is_plain and settings:
        return settings
    for solver in solvers:
        fields = options(solver)
        chosen = source.origin.settings(source.parts.parametrization, fields, tokenizer=source.tokenizer).solver
        possible: Sequence[int | None] = [count for count in counts if count and _can_make(chosen, count)]
        if chosen.is_adaptive:
            possible = [None]
        elif not possible and counts[-1]:
            chosen.grid_size(counts[-1])  # says which numbers it can make
        settings += [source.sampling(fields | {"num_inference_steps": count}) for count in possible]
    return settings


def _can_make(solver: Solver, count: int) -> bool:
    try:
        solver.grid_size(count)
    except ConfigError:
        return False
    return True
