"""`l2d eval-text`: metrics of generated text."""

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

    from l2d_framework.evaluation.text.pretrained import Track

_PICTURE = "eval_text.png"


def eval_text(
    files: Annotated[
        list[Path], typer.Argument(help="JSONL of `l2d generate --output`, or with columns prefix, text and gold.")
    ],
    perplexity_model: Annotated[
        str | None, typer.Option(help="Measure perplexity under this causal language model; a folder or hub id.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Measure entropy over the generator's tokens; a folder or hub id.")
    ] = None,
    mauve: Annotated[bool, typer.Option("--mauve", help="Measure MAUVE against gold texts.")] = False,
    mauve_model: Annotated[
        str | None, typer.Option(help="Features for MAUVE are this model's; gpt2-large, as the authors'.")
    ] = None,
    gold: Annotated[Path | None, typer.Option(help="JSONL with the gold text of every row, for files without.")] = None,
    prefix_column: Annotated[str, typer.Option(help="Column of the prefix.")] = "prefix",
    text_column: Annotated[str, typer.Option(help="Column of the generated text, without its prefix.")] = "text",
    gold_column: Annotated[str, typer.Option(help="Column of the gold text, without its prefix.")] = "gold",
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest input for perplexity, in tokens; the model's limit.")
    ] = None,
    mauve_max_length: Annotated[int, typer.Option(min=1, help="Longest input for MAUVE, in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time; does not change the numbers.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Such as cuda; the GPU when there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the numbers, a report and a picture.")] = None,
) -> None:
    """Measure generated text: perplexity, distinct n-grams, entropy, MAUVE, Zipf's law and repetition.

    Each metric stands as TESS 2's evaluation defines it and, beside it, corrected. Several files are compared.

    Args:
        files: generated texts.
        perplexity_model: for perplexity.
        tokenizer: of the generator.
        mauve: measure MAUVE.
        mauve_model: for MAUVE's features.
        gold: file of gold texts.
        prefix_column: its name.
        text_column: its name.
        gold_column: its name.
        max_length: longest input for perplexity.
        mauve_max_length: longest input for MAUVE.
        batch_size: texts at a time.
        dtype: of the weights.
        device: where to run.
        output: folder.

    Raises:
        ConfigError: if the options cannot be used.
    """
    from l2d_framework.evaluation.text.samples import Columns, read_golds, read_samples

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    if output is not None:
        _check_output(output)
    golds = None if gold is None else read_golds(gold, gold_column)
    columns = Columns(prefix_column, text_column, gold_column)
    found = {name: read_samples(file, columns, golds=golds) for name, file in _named(files).items()}

    from l2d_framework.evaluation.text.likelihood import Judge
    from l2d_framework.evaluation.text.mauve_score import FEATURES_MODEL, Features, check_golds, check_installed
    from l2d_framework.evaluation.text.measure import evaluate_texts
    from l2d_framework.evaluation.text.pretrained import check_device, open_tokenizer, pretrained

    where: dict[str, Any] = {"device": check_device(device), "dtype": dtype}
    words = None if tokenizer is None else open_tokenizer(tokenizer)
    judge = features = None
    if mauve or mauve_model is not None:
        check_installed()
        for name, samples in found.items():
            check_golds(samples, name)
        source = pretrained(mauve_model or FEATURES_MODEL, causal=False, **where)
        features = Features(source, max_length=mauve_max_length, batch_size=batch_size)
    if perplexity_model is not None:
        source = pretrained(perplexity_model, causal=True, **where)
        judge = Judge(source, max_length=max_length, batch_size=batch_size)
    with _progress() as track:
        results = {
            name: evaluate_texts(samples, tokenizer=words, judge=judge, features=features, track=track)
            for name, samples in found.items()
        }
    _show(results)
    if output is not None:
        _write(results, output)


def _named(files: list[Path]) -> dict[str, Path]:
    if len(set(files)) < len(files):
        raise ConfigError(f"A file is named twice among {[str(file) for file in files]}. Name each once.")
    # Short names where they tell the files apart.
    stems = [file.stem for file in files]
    return {file.stem if stems.count(file.stem) == 1 else str(file): file for file in files}


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{str(output)!r} exists and is not empty. Name another --output, so that nothing is lost.")
    existing = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{str(existing)!r} cannot be written. Name another --output.")


@contextmanager
def _progress() -> Iterator[Track]:
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging

    # Loading bars would tear the one below apart.
    logging.disable_progress_bar()
    # The table alone goes to standard output, which may be a pipe.
    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield lambda batches, title: progress.track(batches, description=title)


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console

    from l2d_framework.evaluation.tables import terminal
    from l2d_framework.evaluation.text.report import notes, table

    console = Console()
    console.print(terminal(table(results), "Generated text, ± standard error over samples"))
    for note in notes(results):
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)


def _write(results: dict[str, Any], output: Path) -> None:
    from l2d_framework.evaluation.plots import INSTALL, can_plot
    from l2d_framework.evaluation.text.measure import DEFINITIONS
    from l2d_framework.evaluation.text.report import draw, markdown
    from l2d_framework.training.output_dir import staged

    is_drawn = len(results) > 1 and can_plot()
    with staged(output) as folder:
        if is_drawn:
            draw(results, folder / _PICTURE)
        text = json.dumps({"results": results, "definitions": DEFINITIONS}, indent=2, ensure_ascii=False)
        (folder / "eval_text.json").write_text(text + "\n", encoding="utf-8")
        report = markdown(results, picture=_PICTURE if is_drawn else None)
        (folder / "eval_text.md").write_text(report, encoding="utf-8")
    if len(results) > 1 and not is_drawn:
        typer.echo(f"No picture: matplotlib is missing. {INSTALL}", err=True)
    typer.echo(f"Written to {output}", err=True)
