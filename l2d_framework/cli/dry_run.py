"""`l2d train --dry-run`: what runs would train, hold and take, as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from l2d_framework.cli.completion import values
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.tables import terminal

if TYPE_CHECKING:
    from l2d_framework.config import Run

_SHARDS = ("none", "gradients", "full")

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Train nothing and load no weights: print parameters, memory per device, examples, steps and hours.",
    ),
]
Devices = Annotated[int | None, typer.Option(min=1, help="Of a dry run: devices, each with a process. [1]")]
Shard = Annotated[
    str | None,
    typer.Option(
        help="Of a dry run, what devices divide: none (DDP), gradients (ZeRO 2) or full (ZeRO 3, FSDP). [none]",
        autocompletion=values(*_SHARDS),
    ),
]
TokensPerSecond = Annotated[
    float | None, typer.Option(min=0.001, help="Of a dry run, of all devices together, for the hours.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Of a dry run: print JSON, memory in bytes.")]
_PARTS = {
    "frozen": "frozen weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "gathered": "gathered weights",
    "activations": "activations",
    "vocabulary": "logits and the like",
    "peak": "peak, not all at once",
}
_COUNTS = {
    "steps": "updates",
    "examples": "examples, about",
    "tokens_per_step": "tokens an update",
    "supervised_tokens_per_step": "  of which supervised",
    "tokens": "tokens in all",
}


def check_only_dry(**options: Any) -> None:
    """Refuse options that say something of a dry run alone."""
    for name, value in options.items():
        if value:
            raise ConfigError(
                f"--{name.replace('_', '-')} says something of a dry run. Add --dry-run, or leave it out."
            )


def plan(
    runs: Sequence[Run], *, devices: int | None, shard: str | None, tokens_per_second: float | None, as_json: bool
) -> None:
    """Print what the runs of a file would train, hold and take."""
    if shard not in (None, *_SHARDS):
        raise ConfigError(f"--shard must be one of {', '.join(_SHARDS)}; got {shard!r}.")

    from l2d_framework.cli.common import quieten
    from l2d_framework.training.dry_run import Machine, dry_run  # datasets and transformers take seconds

    quieten()
    chosen: Any = shard or "none"
    plans = dry_run(runs, Machine(devices or 1, chosen, tokens_per_second))
    if as_json:
        typer.echo(json.dumps(plans, indent=2, ensure_ascii=False))
        return
    console = Console()
    for each in plans:
        for table in (_parameters(each), _memory(each), _activations(each), _training(each)):
            if len(table[0]) > 1:
                console.print(terminal(*table))
        if each["memory"]["unknown"]:
            console.print(each["memory"]["unknown"], highlight=False, soft_wrap=True)
        for name, spans in (each["examples"] or {"shown": {}})["shown"].items():
            console.print(example(name, spans, is_colored=console.is_terminal), highlight=False, soft_wrap=True)


def example(name: str, spans: Sequence[Mapping[str, Any]], *, is_colored: bool) -> Text:
    """A text with what is learnt of it in green or, without colours, in brackets."""
    text = Text().append(f"{name}: ", style="bold" if is_colored else "")
    for span in spans:
        if is_colored:
            text.append(span["text"], style="green" if span["learnt"] else "dim")
        else:
            text.append(f"[{span['text']}]" if span["learnt"] else span["text"])
    return text


def _parameters(plan: Mapping[str, Any]) -> tuple[list[Sequence[str]], str]:
    counted = plan["parameters"]
    rows: list[Sequence[str]] = [("part", "parameters", "trained", "weights")]
    for name, part in counted["parts"].items():
        rows.append((name, f"{part['total']:,}", f"{part['trained']:,}", size(part["size"])))
    rows.append(("all", f"{counted['total']:,}", f"{counted['trained']:,}", ""))
    return rows, f"{plan['kind']} run, writes to {plan['output_dir'] or 'nowhere'}"


def _memory(plan: Mapping[str, Any]) -> tuple[list[Sequence[str]], str]:
    memory = plan["memory"]
    cases = memory["cases"]
    heads = [f"{case['length']:,} tokens{', recomputing' * case['gradient_checkpointing']}" for case in cases]
    rows: list[Sequence[str]] = [("", *heads)]
    for field, name in _PARTS.items() if cases else ():
        if any(case[field] for case in cases):
            rows.append((name, *(size(case[field]) for case in cases)))
    title = f"memory of each of {memory['devices']} devices, sharding: {memory['shard']}"
    if memory["devices"] == 1:
        title = "memory of one device"
    return rows, f"{title}, micro-batches of {memory['micro_batch_size']} rows"


def _activations(plan: Mapping[str, Any]) -> tuple[list[Sequence[str]], str]:
    found = plan["memory"]["activations"]
    columns = sorted({(row["length"], row["gradient_checkpointing"]) for row in found}, key=lambda x: x[::-1])
    heads = [f"{length:,} tokens{', recomputing' * recomputes}" for length, recomputes in columns]
    cells = {(r["micro_batch_size"], r["length"], r["gradient_checkpointing"]): size(r["bytes"]) for r in found}
    rows: list[Sequence[str]] = [("rows", *heads)]
    for count in sorted({row["micro_batch_size"] for row in found}):
        rows.append((f"{count:,}", *(cells.get((count, *column), "") for column in columns)))
    return rows, "activations by rows of a micro-batch"


def _training(plan: Mapping[str, Any]) -> tuple[list[Sequence[str]], str]:
    return [("", ""), *_training_rows(plan["training"], plan["examples"])], "training"


def _training_rows(training: Mapping[str, Any], examples: Mapping[str, Any] | None) -> Iterator[Sequence[str]]:
    for key, name in _COUNTS.items():
        if training[key] is not None:
            yield name, f"{training[key]:,}"
    if training["epochs"] is not None:
        yield "epochs", f"{training['epochs']:.2f}"
    rows = (training["batch_size"], training["micro_batch_size"], training["micro_batches_per_device"])
    yield "rows an update", f"{rows[0]:,}, {rows[1]:,} at a time, {rows[2]:,} times on each device"
    if training["hours"] is not None:
        yield f"hours at {training['tokens_per_second']:,g} tokens/s", f"{training['hours']:,.1f}"
    if examples is not None:
        lengths = examples["lengths"]
        yield "examples looked at", f"{examples['looked_at']:,}, {examples['left_out']:,} left out"
        spread = f"{lengths['shortest']:,} to {lengths['longest']:,}, median {lengths['median']:,g}"
        yield "their tokens", f"{spread}, mean {lengths['mean']:,.1f}"
        yield "truncated", f"{examples['truncated']:,}, to {examples['max_length']:,} tokens"
        if examples["supervised_share"] is not None:
            yield "supervised share", f"{examples['supervised_share']:.1%}"


def size(count: int) -> str:
    """Bytes for readers."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}" if count < 100 * unit else f"{count / unit:,.0f} {name}"
    return f"{count / 2**10:,.1f} KiB"
