"""`l2d diagnose`: will more steps help?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2d_framework.cli import common, held_out
from l2d_framework.cli.completion import names
from l2d_framework.errors import ConfigError

if TYPE_CHECKING:
    from l2d_framework.evaluation.diagnosis.diagnose import Settings
    from l2d_framework.models.unloaded import UnloadedModel


def diagnose(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    data: held_out.Data,
    name: held_out.Name = None,
    split: held_out.Split = "train",
    columns: held_out.Columns = None,
    class_column: held_out.ClassColumn = None,
    limit: held_out.Limit = 500,
    max_length: held_out.MaxLength = None,
    times: Annotated[int, typer.Option(min=3, help="Times at which cross-entropies are taken.")] = 20,
    num_inference_steps: Annotated[int | None, typer.Option(min=2, help="Network evaluations per token.")] = None,
    solver: Annotated[
        str | None, typer.Option(help="Name of a solver with fixed steps.", autocompletion=names("solver"))
    ] = None,
    adaptive_solver: Annotated[
        str,
        typer.Option(
            help="Adaptive solver whose evaluations are counted; `none` for none.",
            autocompletion=names("solver", "none"),
        ),
    ] = "fehlberg2",
    set_: common.Settings = None,
    seed: held_out.Seed = None,
    batch_size: held_out.BatchSize = 8,
    base: common.Base = None,
    dtype: common.Dtype = None,
    device: common.Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the numbers and a picture.")] = None,
) -> None:
    """Will more steps help? Compare a network along t with what its own first prediction and Bayes' rule know.

    A calibrated network gains from further evaluations only if it knows more at t than its prediction without the hint
    does together with the exact likelihood of the hint. Beside that: how soon tokens settle on the way, what an
    adaptive solver spends on them, and how many differ from the base model's.
    """
    from l2d_framework.registry import declared

    common.check_dtype(dtype)
    common.check_folder(out, "--out")
    options = common.sampling(set_, solver, num_inference_steps=num_inference_steps, seed=seed)
    if adaptive_solver != "none":
        declared().check_name("solver", adaptive_solver)

    from l2d_framework.cli.meter import Meter
    from l2d_framework.models.unloaded import UnloadedModel
    from l2d_framework.writing import staged

    where = common.check_device(device)
    source = UnloadedModel(model, base=base, dtype=dtype)
    if source.is_plain:
        raise ConfigError(
            f"{model!r} is a plain language model: it has no diffusion network, and more steps mean nothing for it. "
            "Give the output_dir of a diffusion run."
        )
    settings = _settings(source, options, adaptive_solver)
    rows = held_out.HeldOutRows(data, name, split, columns, class_column, limit, max_length)
    rows.check(source, settings.sampling)
    prepared, card = rows.read(source)

    from l2d_framework.evaluation.diagnosis.diagnose import diagnose as run
    from l2d_framework.evaluation.diagnosis.diagnose import time_grid
    from l2d_framework.evaluation.diagnosis.report import draw, sentences, table

    common.quieten()
    with Meter(f"loading {model}"):
        lm = source.load(where)
    settings = replace(settings, times=time_grid(lm.schedule, times))
    with Meter("diagnosing", "batches") as meter:
        result = run(lm, prepared, settings, batch_size=batch_size, track=meter.track)
    title = f"Cross-entropy in nats per token, ± standard error; {result['tokens']:,} tokens of {result['rows']:,} rows"
    common.show(table(result), sentences(result), title=title)
    if out is not None:
        facts = {"model": source.identity(), "sampling": settings.sampling.model_dump(mode="json"), "data": card}
        with staged(out) as folder:
            common.write_json(folder / "diagnosis.json", result | facts | {"device": str(where)})
            if common.can_draw():
                draw(result, folder / "diagnosis.png")
        typer.echo(f"Written to {out}", err=True)


def _settings(source: UnloadedModel, options: dict[str, Any], adaptive_solver: str) -> Settings:
    from l2d_framework.evaluation.diagnosis.diagnose import Settings
    from l2d_framework.registry import registry

    sampling = source.sampling(options).model_copy(update={"patience": None})
    solver, steps = sampling.solver, sampling.num_inference_steps
    if solver.is_adaptive or solver.batch_coupled or not steps or steps < 2:
        raise ConfigError(
            f"Settling is watched on a fixed grid of at least 2 evaluations; solver {solver.component_name()!r} with "
            f"num_inference_steps={steps} has none. Give --solver and --num-inference-steps, such as midpoint and 15."
        )
    adaptive = None
    # A process that is noised afresh follows no differential equation.
    if adaptive_solver != "none" and not solver.is_stochastic:
        other: Any = registry().create("solver", {"name": adaptive_solver})
        if not other.is_adaptive or other.batch_coupled:
            raise ConfigError(
                f"--adaptive-solver {adaptive_solver!r} does not choose the steps of each token by itself. Name one "
                "that does, such as fehlberg2, or none."
            )
        adaptive = source.sampling(options | {"solver": other, "num_inference_steps": None, "patience": None})
    return Settings([], sampling, adaptive)  # a schedule that learns has its times with the weights
