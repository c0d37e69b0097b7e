"""`l2d init`: a run file from five answers and a look at the data."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

import typer

from l2d_framework.cli.completion import names
from l2d_framework.cli.meter import Meter
from l2d_framework.errors import ConfigError, L2DError, suggest

if TYPE_CHECKING:
    from l2d_framework.config import Run
    from l2d_framework.training.data.preview import Preview

T = TypeVar("T")

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(epoch|update)s?")
_LONGEST = 2048
"""Tokens of a sequence above which memory is more likely to be short than data to be lost."""
_FEW = 100
"""Rows below which nothing is held out: a twentieth of them says little."""
_HELD_OUT = 0.05
_LEAST = 20
"""Updates below which a budget in epochs is likely to be meant otherwise: they teach next to nothing."""


class Answers(NamedTuple):
    """What the five questions are about."""

    base: str
    data: str
    method: str
    amount: float
    unit: str
    output_dir: str


def init(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file to write.")] = Path("run.yaml"),
    base: Annotated[str | None, typer.Option(help="Language model to start from: folder or hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data: file, folder or hub id.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Method, such as l2d; `l2d plugins` lists them.", autocompletion=names("method")),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Such as '3 epochs' or '1000 updates'.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="New folder for the model.")] = None,
) -> None:
    """Write a commented run file after five questions, each of which may be answered by an option instead.

    Looks at the data for their format and length, and at the base model for its context and chat template.
    """
    from l2d_framework.cli.common import check_file
    from l2d_framework.registry import declared, registry

    check_file(run_file, "RUN.yaml")
    methods = declared().names("method") if declared().knows_all else [*registry().methods()]
    # What costs nothing to check is checked before anything is asked or looked at.
    for option, given, check in (
        ("--method", method, partial(_method_name, methods)),
        ("--budget", budget, _budget),
        ("--output-dir", output_dir, _folder),
    ):
        if given is not None:
            _checked(option, given, check)

    draft = Draft()
    base = _answer("--base", "Language model to start from (folder or hub id)", base, draft.look_at_base)
    data = _answer("--data", "Training data (file, folder or hub id)", data, draft.look_at_data)

    def fitting(name: str) -> str:
        draft.look_at_method(Answers(base, data, _method_name(methods, name), 1, "epoch", "null"))
        return name

    question = f"Method ({', '.join(methods)})"
    method = _answer("--method", question, method, fitting, default=next(iter(methods), None))
    amount, unit = _answer("--budget", "Budget ('3 epochs' or '1000 updates')", budget, _budget, default="1 epoch")
    name = f"{Path(base).name}-{method}".lower()
    output_dir = _answer("--output-dir", "New folder for the model", output_dir, _folder, default=name)
    draft.write(run_file, Answers(base, data, method, amount, unit, output_dir))


def _answer(
    option: str, question: str, given: str | None, check: Callable[[str], T], *, default: str | None = None
) -> T:
    """What a check makes of the value of an option, or of what is typed instead, asked for until it is right."""
    if given is not None:
        return _checked(option, given, check)
    problem: L2DError | None = None
    while True:
        try:
            typed = str(typer.prompt(question, default=default, err=True))
        except typer.Abort:
            if sys.stdin.isatty():
                raise
            raise problem or ConfigError(f"{option} is missing, and there is nobody to ask. Give it.") from None
        try:
            return check(typed)
        except L2DError as error:
            problem = error
            typer.echo(str(error), err=True)


def _checked(option: str, given: str, check: Callable[[str], T]) -> T:
    try:
        return check(given)
    except L2DError as error:
        raise ConfigError(f"{option}: {error}") from error


def _method_name(methods: Sequence[str], name: str) -> str:
    if name not in methods:
        hint = suggest(name, methods) or "."
        raise ConfigError(f"There is no method {name!r}{hint} Installed are {', '.join(methods) or 'none'}.")
    return name


def _budget(text: str) -> tuple[float, str]:
    parts = _BUDGET.fullmatch(text.strip())
    if parts is None or float(parts[1]) <= 0:
        raise ConfigError(f"A budget must read like '3 epochs' or '1000 updates', got {text!r}.")
    if parts[2] == "update" and not float(parts[1]).is_integer():
        raise ConfigError(f"Updates are whole, got {text!r}. Give a whole number, or a part of an epoch.")
    return float(parts[1]), parts[2]


def _folder(text: str) -> str:
    from l2d_framework.cli.common import check_folder

    check_folder(Path(text).expanduser(), "folder")
    return text


class Draft:
    """The run file on its way: what was seen of the base model, the data and the network while answers were checked."""

    def look_at_base(self, base: str) -> str:
        """Read what there is of a language model without weights."""
        with Meter(f"looking at {base}"):
            from l2d_framework.base_model import load_config
            from l2d_framework.config import ModelSection
            from l2d_framework.config.validation import validated
            from l2d_framework.generation.prompts import context_length
            from l2d_framework.training.run_state import base_tokenizer

            model = validated(ModelSection, {"base": base}, "model")
            self._tokenizer, self._context = base_tokenizer(model), context_length(load_config(model))
        # Elsewhere a path of dots would be another folder.
        return base if Path(base).name.strip(".") else str(Path(base).resolve())

    def look_at_data(self, data: str) -> str:
        """Read the first rows."""
        with Meter(f"looking at {data}"):
            from l2d_framework.training.data.preview import preview

            self._seen = preview(data, self._tokenizer)
        return data

    def look_at_method(self, answers: Answers) -> None:
        """Build the network without weights, which tells whether it serves the base model."""
        with Meter(f"trying {answers.method}"):
            from l2d_framework.config import DiffusionRun
            from l2d_framework.models.checkpoint import build_model

            (run,) = self._read(_text(answers, self._seen, self._context, trains_base=False))
            assert isinstance(run, DiffusionRun)  # what a method makes
            network = build_model(run, meta=True)
        self._trains_base = network.backbone.trains_lm
        self._count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)

    def write(self, run_file: Path, answers: Answers) -> None:
        """Write the run file, once its rows have been encoded."""
        from l2d_framework.training.run import check_rows

        text = _text(answers, self._seen, self._context, trains_base=self._trains_base)
        with Meter("checking"):
            notes = check_rows(self._read(text))
        with run_file.open("x", encoding="utf-8") as file:
            file.write(text)
        updates = _updates(answers, self._seen)
        if updates is not None and updates < _LEAST and answers.unit == "epoch":
            more = max(round(answers.amount * 5 * _LEAST / updates), 1)
            notes.append(
                f"This budget makes {updates} updates, which teach next to nothing. Raise training.epochs, such as to "
                f"{more}, or lower training.batch_size."
            )
        for note in notes:
            typer.echo(f"Note: {note}", err=True)
        typer.echo(f"{_looks(self._seen)} {self._count:,} parameters will be trained.")
        typer.echo(f"Wrote {run_file}. Next: l2d train {run_file}")

    @staticmethod
    def _read(text: str) -> list[Run]:
        from l2d_framework.config import check_runs, load_run

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "run.yaml")
            file.write_text(text, encoding="utf-8")
            runs = list(load_run(file))
        check_runs(runs)
        return runs


def _looks(seen: Preview) -> str:
    what = {"messages": "conversations", "prompt_completion": "prompts with completions", "text": "plain texts"}
    lengths, few = seen.lengths, "" if seen.is_whole else "the first "
    return (
        f"Of {few}{len(lengths)} {what[seen.format]} the shortest has {lengths[0]} tokens, half have at most "
        f"{lengths[len(lengths) // 2]}, the longest {lengths[-1]}."
    )


def _updates(answers: Answers, seen: Preview) -> int | None:
    """Updates of the run; None where nobody knows how many rows there are, as of texts, which may be joined and cut."""
    if answers.unit == "update":
        return int(answers.amount)
    if not seen.is_whole or seen.format == "text":
        return None
    rows = len(seen.lengths) - (0 if _is_small(seen) else round(_HELD_OUT * len(seen.lengths)))
    return max(int(-(-rows * answers.amount // _batch_size(seen))), 1)


def _is_small(seen: Preview) -> bool:
    return seen.is_whole and len(seen.lengths) < _FEW


def _batch_size(seen: Preview) -> int:
    return 8 if _is_small(seen) else 32


def _text(answers: Answers, seen: Preview, context: int | None, *, trains_base: bool) -> str:
    import torch

    has_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    length = min(-(-seen.lengths[-1] // 64) * 64, _LONGEST, context or _LONGEST)
    long = sum(size > length for size in seen.lengths)
    source = {"path": seen.source.path} | ({"columns": seen.source.columns} if seen.source.columns else {})
    updates = _updates(answers, seen)
    save, log = (100, 10) if updates is None else (max(min(100, updates // 10), 1), max(min(10, updates // 20), 1))
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
        if _is_small(seen)
        else f"  eval_fraction: {_HELD_OUT}  # held out, to see whether the model learns or remembers",
        f"  max_length: {length}  # tokens; "
        + (f"{long} of these are cut off" if long else "none of these is cut off"),
    ]
    if seen.chat_template is not None:
        lines.append(f"  chat_template: {seen.chat_template}  # the base model has none of its own")
    if seen.format == "text" and long:
        lines.append("  pack: true  # texts are joined and cut, so that nothing of them is lost")
    lines += [
        "training:",
        f"  epochs: {answers.amount:g}" if answers.unit == "epoch" else f"  max_steps: {int(answers.amount)}",
        f"  batch_size: {_batch_size(seen)}  # sequences of an update",
        "  micro_batch_size: auto  # as many at a time as memory allows",
        f"  learning_rate: {'1.0e-5' if trains_base else '1.0e-4'}  # "
        + ("all weights of the base model learn" if trains_base else "the base model stays as it is"),
        "  warmup_ratio: 0.05",
        f"  bf16: {'true' if has_gpu else 'false'}  # true on a GPU that has bfloat16",
        f"  logging_steps: {log}",
        f"  save_steps: {save}  # an interrupted run goes on from the last update that was saved",
        "  # eval_steps: 100  # measure held-out rows on the way, not at the end alone",
        "  # report_to: [tensorboard]  # or wandb, trackio",
        f"output_dir: {json.dumps(answers.output_dir, ensure_ascii=False)}",
        "seed: 0",
    ]
    return "\n".join(lines) + "\n"
