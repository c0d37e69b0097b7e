"""`l2d eval-steps`: do evaluations pay?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l2d_framework.cli import common, held_out
from l2d_framework.cli.completion import names
from l2d_framework.errors import ConfigError

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
        list[str] | None,
        typer.Option(
            help="Name of a solver; may be repeated. The model's own, if not given.", autocompletion=names("solver")
        ),
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
    common.check_dtype(dtype)
    common.check_folder(out, "--out")
    options = [common.sampling(set_, named, seed=seed) for named in (solver or (None,))]
    counts = _counts(num_inference_steps)

    from l2d_framework.cli.meter import Meter
    from l2d_framework.evaluation.diagnosis.steps import draw, left_out, possible, sentences, table
    from l2d_framework.evaluation.diagnosis.steps import eval_steps as run
    from l2d_framework.models.unloaded import UnloadedModel
    from l2d_framework.writing import staged

    where = common.check_device(device)
    source = UnloadedModel(model, base=base, dtype=dtype)
    settings = possible(source, options, counts)
    rows = held_out.HeldOutRows(data, name, split, columns, class_column, limit, max_length)
    for sampling in settings:
        rows.check(source, sampling)
    prepared, card = rows.read(source)
    if num_inference_steps != _STEPS:  # of the usual numbers everything takes what it can make
        for reason in left_out(source, options, counts):
            typer.echo(f"Left out: {reason}", err=True)

    common.quieten()
    with Meter(f"loading {model}"):
        lm = source.load(where)
    with Meter("solving", "batches") as meter:
        result = run(lm, prepared, settings, batch_size=batch_size, track=meter.track)
    weights = str(lm.backbone.lm.dtype).removeprefix("torch.")
    title = f"{result['tokens']:,} held-out tokens in {result['rows']:,} rows, the true ones before given; {weights}"
    common.show(table(result), sentences(result), title=title)
    if out is not None:
        facts = {"model": source.identity(), "sampling": settings[-1].model_dump(mode="json"), "data": card}
        with staged(out) as folder:
            common.write_json(folder / "steps.json", result | facts | {"device": str(where)})
            if common.can_draw():
                draw(result, folder / "steps.png")
        typer.echo(f"Written to {out}", err=True)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(count) for count in text.split(",")]
    except ValueError:
        counts = [-1]
    if min(counts) < 0:
        raise ConfigError(f"--num-inference-steps {text!r} must be whole numbers with commas, such as 0,1,3,15.")
    return counts
