"""`l2d init`: a run file from five answers and a look at the data."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from l2d_framework.errors import ConfigError, suggest

if TYPE_CHECKING:
    from l2d_framework.config import Run
    from l2d_framework.training.data.preview import Preview

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(epoch|update)s?")
_LONGEST = 2048
"""Tokens of a sequence above which memory is more likely to be short than data to be lost."""
_FEW = 100
"""Rows below which nothing is held out: a twentieth of them says little."""


class Answers(NamedTuple):
    """What the five questions are about."""

    base: str
    data: str
    method: str
    amount: float
    unit: str
    output_dir: str


def init(
    run_file: Annotated[Path, typer.Argument(metavar="[RUN.yaml]", help="Run file to write.")] = Path("run.yaml"),
    base: Annotated[str | None, typer.Option(help="Language model to start from: folder or hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data: file, folder or hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="Method, such as l2d; `l2d plugins` lists them.")] = None,
    budget: Annotated[str | None, typer.Option(help="Such as '3 epochs' or '1000 updates'.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="New folder for the model.")] = None,
) -> None:
    """Write a commented run file after five questions, each of which may be answered by an option instead.

    Looks at the data for their format and length, and at the base model for its context and chat template.
    """
    from l2d_framework.cli.common import check_file

    check_file(run_file, "RUN.yaml")
    from l2d_framework.registry import registry

    methods = registry().methods()
    base = _answer("--base", "Language model to start from (folder or hub id)", base)
    data = _answer("--data", "Training data (file, folder or hub id)", data)
    method = _answer("--method", f"Method ({', '.join(methods)})", method, next(iter(methods), None))
    if method not in methods:
        hint = suggest(method, methods) or "."
        raise ConfigError(f"--method: there is no {method!r}{hint} Installed are {', '.join(methods) or 'none'}.")
    budget = _answer("--budget", "Budget ('3 epochs' or '1000 updates')", budget, "1 epoch")
    parts = _BUDGET.fullmatch(budget.strip())
    if parts is None or float(parts[1]) <= 0:
        raise ConfigError(f"--budget must read like '3 epochs' or '1000 updates', got {budget!r}.")
    name = f"{Path(base).name}-{method}".lower()
    output_dir = _answer("--output-dir", "New folder for the model", output_dir, name)
    _write(run_file, Answers(base, data, method, float(parts[1]), parts[2], output_dir))


def _answer(option: str, question: str, given: str | None, default: str | None = None) -> str:
    """The value of an option, or what is typed instead."""
    if given is not None:
        return given
    try:
        return str(typer.prompt(question, default=default, err=True))
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        raise ConfigError(f"{option} is missing, and there is nobody to ask. Give it.") from None


def _write(run_file: Path, answers: Answers) -> None:
    from l2d_framework.base_model import load_config
    from l2d_framework.config import DiffusionRun, ModelSection, check_runs, load_run
    from l2d_framework.generation.prompts import context_length
    from l2d_framework.models.checkpoint import build_model
    from l2d_framework.training.data.preview import preview
    from l2d_framework.training.run import check_rows
    from l2d_framework.training.run_state import base_tokenizer

    model = ModelSection(base=answers.base)
    seen = preview(answers.data, base_tokenizer(model))
    context = context_length(load_config(model))
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, "run.yaml")

        def read(text: str) -> list[Run]:
            draft.write_text(text, encoding="utf-8")
            return list(load_run(draft))

        runs = read(_text(answers, seen, context, trains_base=False))
        check_runs(runs)
        (run,) = runs
        assert isinstance(run, DiffusionRun)  # what a method makes
        network = build_model(run, meta=True)
        text = _text(answers, seen, context, trains_base=network.backbone.trains_lm)
        notes = check_rows(read(text))
    with run_file.open("x", encoding="utf-8") as file:
        file.write(text)
    for note in notes:
        typer.echo(f"Note: {note}", err=True)
    count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    typer.echo(f"{_looks(seen)} {count:,} parameters will be trained.")
    typer.echo(f"Wrote {run_file}. Next: l2d train {run_file}")


def _looks(seen: Preview) -> str:
    what = {"messages": "conversations", "prompt_completion": "prompts with completions", "text": "plain texts"}
    lengths, few = seen.lengths, "" if seen.is_whole else "the first "
    return (
        f"Of {few}{len(lengths)} {what[seen.format]} the shortest has {lengths[0]} tokens, half have at most "
        f"{lengths[len(lengths) // 2]}, the longest {lengths[-1]}."
    )


def _text(answers: Answers, seen: Preview, context: int | None, *, trains_base: bool) -> str:
    import torch

    has_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    length = min(-(-seen.lengths[-1] // 64) * 64, _LONGEST, context or _LONGEST)
    long = sum(size > length for size in seen.lengths)
    source = {"path": seen.source.path} | ({"columns": seen.source.columns} if seen.source.columns else {})
    is_small = seen.is_whole and len(seen.lengths) < _FEW
    lines = [
        "# Written by `l2d init`. `l2d help training.batch_size` explains an option, `l2d help` lists all of them.",
        "model:",
        f"  base: {json.dumps(answers.base, ensure_ascii=False)}",
        f"  dtype: {'bfloat16' if has_gpu else 'float32'}  # bfloat16 halves the memory; CPUs are slow with it",
        f"method: {answers.method}  # components and settings; what stands in this file wins",
        "data:",
        f"  # {_looks(seen)}",
        "  train:",
        f"    - {json.dumps(source, ensure_ascii=False)}",
        "  eval_fraction: 0.0  # too few rows to hold some out; 0.05 later"
        if is_small
        else "  eval_fraction: 0.05  # held out, to see whether the model learns or remembers",
        f"  max_length: {length}  # tokens; "
        + (f"{long} of these are cut off" if long else "none of these is cut off"),
    ]
    if seen.chat_template is not None:
        lines.append(f"  chat_template: {seen.chat_template}  # the base model has none of its own")
    if seen.format == "text" and long:
        lines.append("  pack: true  # texts are joined and cut, so that nothing of them is lost")
    lines += [
        "training:",
        f"  epochs: {answers.amount:g}" if answers.unit == "epoch" else f"  max_steps: {max(int(answers.amount), 1)}",
        f"  batch_size: {8 if is_small else 32}  # sequences of an update",
        "  micro_batch_size: auto  # as many at a time as memory allows",
        f"  learning_rate: {'1.0e-5' if trains_base else '1.0e-4'}  # "
        + ("all weights of the base model learn" if trains_base else "the base model stays as it is"),
        "  warmup_ratio: 0.05",
        f"  bf16: {'true' if has_gpu else 'false'}  # true on a GPU that has bfloat16",
        "  logging_steps: 10",
        "  save_steps: 100  # updates after which an interrupted run goes on",
        "  # eval_steps: 100  # measure held-out rows on the way, not at the end alone",
        "  # report_to: [tensorboard]  # or wandb, trackio",
        f"output_dir: {json.dumps(answers.output_dir, ensure_ascii=False)}",
        "seed: 0",
    ]
    return "\n".join(lines) + "\n"
