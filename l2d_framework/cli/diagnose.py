"""`l2d diagnose`: will more steps help?"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2d_framework.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from l2d_framework.config import SamplingSection
    from l2d_framework.evaluation.diagnosis.diagnose import Settings, Track
    from l2d_framework.models.unloaded import Source

_NUMBERS, _PICTURE = "diagnosis.json", "diagnosis.png"


def diagnose(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    data: Annotated[list[str], typer.Option(help="Held-out rows: file, folder or hub id; may be given several times.")],
    name: Annotated[str | None, typer.Option(help="Configuration of the data sets.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data sets.")] = "train",
    columns: Annotated[
        list[str] | None, typer.Option(help="Column by another name, such as prompt=question; may be repeated.")
    ] = None,
    class_column: Annotated[str | None, typer.Option(help="Column with the class label of a row.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows to take of each data set; 0 for all.")] = 500,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest row in tokens, the rest is cut off; 2048 or the model's limit.")
    ] = None,
    times: Annotated[int, typer.Option(min=3, help="Times at which cross-entropies are taken.")] = 20,
    num_inference_steps: Annotated[int | None, typer.Option(min=2, help="Network evaluations per token.")] = None,
    solver: Annotated[str | None, typer.Option(help="Name of a solver with fixed steps.")] = None,
    adaptive_solver: Annotated[
        str, typer.Option(help="Adaptive solver whose evaluations are counted; `none` for none.")
    ] = "fehlberg2",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Other sampling setting, such as estimate.mode=argmax.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all noise.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time; does not change the numbers.")] = 8,
    base: Annotated[str | None, typer.Option(help="Where the base model lies now, if it has moved.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda; the GPU when there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the numbers and a picture.")] = None,
) -> None:
    """Will more steps help? Compare a network along t with what its own first prediction and Bayes' rule know.

    A calibrated network gains from further evaluations only if it knows more at t than its prediction without the hint
    does together with the exact likelihood of the hint. Beside that: how soon tokens settle on the way, what an
    adaptive solver spends on them, and how many differ from the base model's.

    Args:
        model: checkpoint.
        data: held-out rows.
        name: configuration of the data sets.
        split: of the data sets.
        columns: columns by other names.
        class_column: column with class labels.
        limit: rows of each data set.
        max_length: longest row.
        times: how many.
        num_inference_steps: evaluations per token.
        solver: its name.
        adaptive_solver: its name.
        set_: other settings.
        seed: of all noise.
        batch_size: rows at a time.
        base: where the base model lies.
        dtype: of the weights.
        device: where to run.
        out: folder.

    Raises:
        ConfigError: if the options do not go together or do not fit the model.
    """
    from l2d_framework.config.files import override
    from l2d_framework.evaluation.text.pretrained import check_device
    from l2d_framework.models.unloaded import Source

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    where = check_device(device)
    if out is not None:
        _check_output(out)
    source = Source(model, base=base, dtype=dtype, revision=None)
    if source.is_plain:
        raise ConfigError(
            f"{model!r} is a plain language model: it has no diffusion network, and more steps mean nothing for it. "
            "Give the output_dir of a diffusion run."
        )
    given = {
        "num_inference_steps": num_inference_steps,
        "solver": None if solver is None else {"name": solver},
        "seed": seed,
    }
    options = override({key: value for key, value in given.items() if value is not None}, set_ or [])
    settings = _settings(source, options, adaptive_solver, times)
    _check_guidance(settings.sampling, class_column)
    rows, card = _rows(source, data, _fields(name, split, columns, class_column, limit), max_length)

    from l2d_framework.evaluation.diagnosis.diagnose import diagnose as run

    lm = source.load(where)
    with _progress() as track:
        found = run(lm, rows, settings, batch_size=batch_size, track=track)
    _show(found)
    if out is not None:
        facts = {"model": source.identity(), "sampling": settings.sampling.model_dump(mode="json"), "data": card}
        _write(found | facts | {"device": str(where)}, out)


def _settings(source: Source, options: dict[str, Any], adaptive_solver: str, times: int) -> Settings:
    from l2d_framework.evaluation.diagnosis.diagnose import Settings, time_grid
    from l2d_framework.registry import registry

    sampling = source.sampling(options).model_copy(update={"patience": None})
    solver, steps = sampling.solver, sampling.num_inference_steps
    if solver.is_adaptive or solver.batch_coupled or not steps or steps < 2:
        raise ConfigError(
            f"EarlyStop is watched on a fixed grid of at least 2 evaluations; solver {solver.component_name()!r} with "
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
    schedule: Any = registry().create("schedule", source.manifest["schedule"])
    return Settings(time_grid(schedule, times), sampling, adaptive)


def _check_guidance(sampling: SamplingSection, class_column: str | None) -> None:
    for guidance in sampling.guidance:
        if class_column is None and guidance.needs_classes and guidance.scale != guidance.neutral_scale:
            raise ConfigError(
                f"Guidance {guidance.component_name()!r} with scale {guidance.scale:g} guides towards classes, and the "
                "rows name none. Add --class-column NAME, or leave the guidance out."
            )


def _fields(
    name: str | None, split: str, columns: list[str] | None, class_column: str | None, limit: int
) -> dict[str, Any]:
    pairs = [column.partition("=") for column in columns or []]
    for ours, sign, theirs in pairs:
        if not (ours and sign and theirs):
            raise ConfigError(f"--columns {ours + sign + theirs!r} must read OURS=THEIRS, such as prompt=question.")
    return {
        "name": name,
        "split": split,
        "columns": {ours: theirs for ours, _, theirs in pairs},
        "class_column": class_column,
        "limit": limit or None,
    }


def _rows(source: Source, data: list[str], fields: dict[str, Any], max_length: int | None) -> tuple[Any, Any]:
    from l2d_framework.config import DataSection
    from l2d_framework.config.validation import validated
    from l2d_framework.generation.prompts import context_length
    from l2d_framework.training.data.prepare import prepare

    longest = context_length(source.lm_config)
    if max_length is not None and longest is not None and max_length > longest:
        raise ConfigError(f"--max-length {max_length} exceeds the model's context of {longest}. Lower it.")
    length = max_length or min(longest or 2048, 2048)
    sources = [{"path": path, **fields} for path in data]
    section = validated(DataSection, {"train": sources, "max_length": length}, "data")
    prepared = prepare(section, source.tokenizer, classes=source.classes)
    return list(prepared.train), prepared.card["sources"]["train"]


def _check_output(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} exists and is not empty. Name another --out, so that nothing is lost.")
    existing = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{str(existing)!r} cannot be written. Name another --out.")


@contextmanager
def _progress() -> Iterator[Track]:
    from rich.console import Console
    from rich.progress import Progress

    # The table alone goes to standard output, which may be a pipe.
    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield lambda batches: progress.track(batches, description="diagnosing")


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    from l2d_framework.evaluation.diagnosis.report import sentences, table
    from l2d_framework.evaluation.tables import terminal

    console = Console()
    title = f"Cross-entropy in nats per token, ± standard error; {found['tokens']:,} tokens of {found['rows']:,} rows"
    console.print(terminal(table(found), title))
    for line in sentences(found):
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)


def _write(found: dict[str, Any], out: Path) -> None:
    from l2d_framework.evaluation.diagnosis.report import draw
    from l2d_framework.evaluation.plots import INSTALL, can_plot
    from l2d_framework.training.output_dir import staged

    can_draw = can_plot()
    with staged(out) as folder:
        text = json.dumps(found, indent=2, ensure_ascii=False)
        (folder / _NUMBERS).write_text(text + "\n", encoding="utf-8")
        if can_draw:
            draw(found, folder / _PICTURE)
    if not can_draw:
        typer.echo(f"No picture: matplotlib is missing. {INSTALL}", err=True)
    typer.echo(f"Written to {out}", err=True)
