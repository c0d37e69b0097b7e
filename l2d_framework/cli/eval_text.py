"""`l2d eval-text`: metrics of generated text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from l2d_framework.cli import common


def eval_text(
    files: Annotated[
        list[Path], typer.Argument(help="JSONL of `l2d generate --out`, or with columns prefix, text and gold.")
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
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the numbers, a report and a picture.")] = None,
) -> None:
    """Measure generated text: perplexity, distinct n-grams, entropy, MAUVE, Zipf's law and repetition.

    Each metric stands as TESS 2's evaluation defines it and, beside it, corrected. Several files are compared.
    """
    from l2d_framework.cli.meter import Meter
    from l2d_framework.evaluation.text.samples import Columns, read_golds, read_samples

    common.check_dtype(dtype)
    common.check_folder(out, "--out")
    common.quieten()
    golds = None if gold is None else read_golds(gold, gold_column)
    columns = Columns(prefix_column, text_column, gold_column)
    samples = {name: read_samples(file, columns, golds=golds) for name, file in common.named(files).items()}

    from l2d_framework.evaluation.text.judge import Judge, open_tokenizer, pretrained
    from l2d_framework.evaluation.text.mauve_score import FEATURES_MODEL, Features, check_golds, check_installed
    from l2d_framework.evaluation.text.measure import DEFINITIONS, evaluate_texts
    from l2d_framework.evaluation.text.report import draw, markdown, notes, table
    from l2d_framework.writing import staged

    where: dict[str, Any] = {"device": common.check_device(device), "dtype": dtype}
    words = None if tokenizer is None else open_tokenizer(tokenizer)
    judge = features = None
    if mauve or mauve_model is not None:
        check_installed()
        for name, texts in samples.items():
            check_golds(texts, name)
        source = pretrained(mauve_model or FEATURES_MODEL, causal=False, **where)
        features = Features(source, max_length=mauve_max_length, batch_size=batch_size)
    if perplexity_model is not None:
        source = pretrained(perplexity_model, causal=True, **where)
        judge = Judge(source, max_length=max_length, batch_size=batch_size)
    with Meter("measuring", "batches") as meter:
        results = {
            name: evaluate_texts(texts, tokenizer=words, judge=judge, features=features, track=meter.track)
            for name, texts in samples.items()
        }
    common.show(table(results), notes(results), title="Generated text, ± standard error over samples")
    if out is not None:
        picture = "eval_text.png" if len(results) > 1 and common.can_draw() else None
        with staged(out) as folder:
            if picture:
                draw(results, folder / picture)
            common.write_json(folder / "eval_text.json", {"results": results, "definitions": DEFINITIONS})
            (folder / "eval_text.md").write_text(markdown(results, picture=picture), encoding="utf-8")
        typer.echo(f"Written to {out}", err=True)
