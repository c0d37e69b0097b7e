"""`l2d eval`, lm_eval with the model `l2d`, and `l2d tune-search`, which chooses settings of token search."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from l2d_framework.cli.common import Device
from l2d_framework.errors import ConfigError, PluginError, install
from l2d_framework.evaluation.harness.command import run
from l2d_framework.evaluation.harness.start_up import steps
from l2d_framework.evaluation.tables import Fitting, terminal

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def evaluate(ctx: typer.Context) -> None:
    """Evaluate a model on the tasks of lm_eval, whose options these are: `l2d eval --help` lists them."""
    run(ctx.args or ["--help"])


_SHOWN = 8
"""Best rows shown of each task; the file has all."""


def tune_search(
    model_args: Annotated[str, typer.Option("--model_args", help="As for `l2d eval`, such as pretrained=PATH.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm_eval with training items, each TASK or CATEGORY=TASK.")],
    out: Annotated[Path, typer.Option(help="JSON file for the rows and the choice; taken up again if it exists.")],
    limit: Annotated[int, typer.Option(min=1, help="First training items of each task.")] = 100,
    beams: Annotated[int, typer.Option(min=2, help="Hypotheses.")] = 15,
    length_powers: Annotated[str, typer.Option(help="Values of search_length_power to try.")] = "0,0.5,1",
    repetition_penalties: Annotated[str, typer.Option(help="Values of search_repetition_penalty to try.")] = "1,1.1",
    temperatures: Annotated[str, typer.Option(help="Values of search_temperature to try.")] = "0,0.1,1",
    metric: Annotated[str | None, typer.Option(help="Such as exact_match,strict-match; the task's first.")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num_fewshot", min=0, help="Examples before a question.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply_chat_template", help="Ask as a conversation, examples as its past.")
    ] = False,
    include_path: Annotated[Path | None, typer.Option("--include_path", help="Folder of further task files.")] = None,
    device: Device = None,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm_run_unsafe_code", help="Let tasks run code that the model writes.")
    ] = False,
) -> None:
    """Choose length power, repetition penalty and temperature of token search, per category, on training items.

    Tries every combination. Called again it goes on where it was interrupted. `l2d eval --model_args
    pretrained=PATH,search=FILE` then searches with the settings of each task's category.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise PluginError(f"Tuning search needs lm_eval. Run: {install('l2d-framework[eval]')}")
    powers = _numbers("length-powers", length_powers)
    penalties = _numbers("repetition-penalties", repetition_penalties, least=1e-3)
    values = powers, penalties, _numbers("temperatures", temperatures, least=0.0)

    from tqdm import tqdm  # type: ignore[import-untyped]

    from l2d_framework.evaluation.search.tuning import Question, grid, open_model, tune

    steps.prepare([steps.CONFIRMED] if confirm_run_unsafe_code else [])
    settings = grid(beams, *values)
    lm = open_model(model_args, device)
    # The harness warns at every row that options replace those of the task, which is what is wanted.
    logging.getLogger("lm_eval.evaluator").setLevel(logging.ERROR)
    question = Question(
        [name for name in tasks.split(",") if name],
        limit,
        metric=metric,
        num_fewshot=num_fewshot,
        is_chat=apply_chat_template,
        folder=include_path,
        runs_code=confirm_run_unsafe_code,
    )
    chosen = tune(lm, question, settings, out=out, track=partial(tqdm, desc="Tuning search", unit="row"))
    console = Console()
    for table in _tables(out, chosen):
        console.print(table)
    # What was tuned for one way of asking need not be right for another.
    same = " --apply_chat_template" * apply_chat_template + (f" --include_path {include_path}" if include_path else "")
    console.print(f"Search with:  l2d eval --model_args {model_args},search={out}{same} --tasks ...", soft_wrap=True)


def _numbers(name: str, text: str, least: float | None = None) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--{name} takes numbers with commas between them, got {text!r}.") from error
    if least is not None and min(numbers) < least:
        raise ConfigError(f"--{name} must be at least {least:g}, got {min(numbers):g}.")
    return numbers


def _tables(out: Path, chosen: dict[str, Any]) -> Iterator[Fitting]:
    measured = json.loads(out.read_text(encoding="utf-8"))
    for task, where in measured["identity"]["tasks"].items():
        rows = [row for row in measured["rows"] if row["task"] == task]
        rows.sort(key=lambda row: row["score"], reverse=where["is_better_high"])
        lines: list[tuple[str, ...]] = [("power", "penalty", "temperature", rows[0]["metric"], "± error", "")]
        for number, row in enumerate(rows):
            is_chosen = row["settings"] == chosen[where["category"]]
            if number < _SHOWN or is_chosen:
                names = ("length_power", "repetition_penalty", "temperature")
                error = "-" if row["error"] is None else f"{row['error']:.4f}"
                cells = [*(f"{row['settings'][name]:g}" for name in names), f"{row['score']:.4f}", error]
                lines.append((*cells, "chosen" if is_chosen else ""))
        title = f"{task}: {rows[0]['items']} items of {where['split']}, category {where['category']}"
        yield terminal(lines, title)
