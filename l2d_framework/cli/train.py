"""`l2d train` and `l2d train-reward`: run files to trained models."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from l2d_framework.cli.common import Overrides, RunFile
from l2d_framework.cli.dry_run import AsJson, Devices, DryRun, Shard, TokensPerSecond, check_only_dry, plan
from l2d_framework.cli.meter import Meter
from l2d_framework.evaluation.tables import terminal

if TYPE_CHECKING:
    from l2d_framework.cli.progress import Reporter
    from l2d_framework.config import Run

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Move an output folder that exists aside and start anew.")]

AcceptChangedData = Annotated[
    bool, typer.Option("--accept-changed-data", help="Go on although the data have changed; run.json will tell.")
]


_NEXT = (
    "To begin anew, add --overwrite, which moves the folder aside, or name another output_dir. To go on from where it "
    "ended, raise training.max_steps or training.epochs."
)


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    accept_changed_data: AcceptChangedData = False,
    dry_run: DryRun = False,
    devices: Devices = None,
    shard: Shard = None,
    tokens_per_second: TokensPerSecond = None,
    as_json: AsJson = False,
) -> None:
    """Train the run, or the pipeline of runs, of a file; called again, it goes on where it was interrupted.

    Works under `accelerate launch -m l2d_framework.cli train` and `torchrun -m l2d_framework.cli train`.
    """
    from l2d_framework.config import load_run

    console = Console()
    runs = load_run(run_file, overrides)
    if dry_run:
        plan(runs, devices=devices, shard=shard, tokens_per_second=tokens_per_second, as_json=as_json)
        return
    check_only_dry(devices=devices, shard=shard, tokens_per_second=tokens_per_second, json=as_json)

    with _reporting(console) as report:
        from l2d_framework.training.run import train_runs  # datasets and the Trainer take seconds

        finished = _finished(runs, overwrite=overwrite)
        cards = train_runs(runs, overwrite=overwrite, accept_changed_data=accept_changed_data, callbacks=report)
    if not _leave():
        return
    for run, card in zip(runs, cards, strict=True):
        _show(console, run, card, _training_rows(card), finished)
        if card["kind"] == "diffusion":
            is_chat = any(source["format"] == "messages" for source in card["data"]["sources"]["train"])
            how = "--chat" if is_chat else '--prompt "..."'
            console.print(f"Generate with:  l2d generate {run.output_dir} {how}", soft_wrap=True, highlight=False)


def train_reward(
    run_file: RunFile,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    accept_changed_data: AcceptChangedData = False,
    dry_run: DryRun = False,
    devices: Devices = None,
    shard: Shard = None,
    tokens_per_second: TokensPerSecond = None,
    as_json: AsJson = False,
) -> None:
    """Train a reward model with TRL; called again, it goes on from the last checkpoint.

    The run file has `kind: reward`; the result serves `l2d generate --guidance reward_gradient`.
    """
    from l2d_framework.config import load_run

    console = Console()
    stages = load_run(run_file, overrides)
    if dry_run:
        plan(stages, devices=devices, shard=shard, tokens_per_second=tokens_per_second, as_json=as_json)
        return
    check_only_dry(devices=devices, shard=shard, tokens_per_second=tokens_per_second, json=as_json)

    with _reporting(console) as report:
        from l2d_framework.training.reward.run import check_ready
        from l2d_framework.training.reward.run import train_reward as train_one

        runs = check_ready(stages, overwrite=overwrite)
        finished = _finished(runs, overwrite=overwrite)
        options = {"overwrite": overwrite, "accept_changed_data": accept_changed_data}
        cards = [train_one(run, **options, callbacks=report(run)) for run in runs]
    if _leave():
        for run, card in zip(runs, cards, strict=True):
            _show(console, run, card, _reward_rows(card), finished)


@contextmanager
def _reporting(console: Console) -> Iterator[Callable[[Run], list[Reporter]]]:
    """Makes the callbacks of each run, and gives the terminal back at the end or after an error."""
    with ExitStack() as open_:
        open_.enter_context(Meter("starting"))
        from l2d_framework.cli.common import quieten
        from l2d_framework.cli.progress import progress

        quieten()

        def report(run: Run) -> list[Reporter]:
            open_.close()
            reporter = progress(console, Path(str(run.output_dir)).name)
            open_.callback(reporter.close)
            return [reporter]

        yield report


def _leave() -> bool:
    """End what the processes have in common; True in the first of them."""
    from accelerate import PartialState

    state = PartialState()
    is_first = bool(state.is_main_process)
    state.destroy_process_group()
    return is_first


def _finished(runs: Sequence[Run], *, overwrite: bool) -> set[Path]:
    """Output folders of runs that have finished before, and will not be trained again."""
    from l2d_framework.training.output_dir import is_done, read_card
    from l2d_framework.training.run_state import output_folder

    begun = {output_folder(run): run for run in runs if run.output_dir is not None and not overwrite}
    cards = {folder: read_card(folder) for folder in begun}
    return {folder for folder, card in cards.items() if card and is_done(card, begun[folder].model_dump(mode="json"))}


def _show(
    console: Console, run: Run, card: dict[str, Any], rows: Iterable[Sequence[str]], finished: Container[Path]
) -> None:
    from l2d_framework.training.run_state import output_folder

    memory = ("peak memory", f"{card['result']['peak_memory'] / 2**30:.2f} GiB")
    if output_folder(run) in finished:
        text = f"{run.output_dir} had finished before, at {card['ended']}, so nothing was trained now. {_NEXT}"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    console.print(terminal([*rows, memory], f"{run.output_dir}, finished {card['ended']}"))


def _training_rows(card: dict[str, Any]) -> Iterator[Sequence[str]]:
    from l2d_framework.training.metrics import BINS
    from l2d_framework.writing import speed

    result, losses = card["result"], card["result"]["losses"]
    names = {"loss": "loss, nats per token", "loss_without_pads": "  without pads"}
    names |= {f"loss_t{i:02d}": f"  t in [{i / BINS:.1f}, {(i + 1) / BINS:.1f})" for i in range(BINS)}
    yield "", "training", "held out"
    for key, name in names.items():
        shown = [f"{losses[k]:.4f}" if k in losses else "" for k in (key, f"eval_{key}")]
        if any(shown):
            yield name, *shown
    yield ()
    yield "updates", f"{result['steps']:,}"
    yield "trained parameters", f"{card['parameters']['trainable']:,}"
    yield "duration", f"{card['seconds']:,.0f} s"
    yield "speed", speed(result["tokens_per_second"])


def _reward_rows(card: dict[str, Any]) -> Iterator[Sequence[str]]:
    result, splits = card["result"], card["data"]["splits"]
    parts = (result["train"], result["held_out"] or {})
    yield "", "last training batches", "held out"
    yield "pairs", *(f"{splits[which]['pairs']:,}" if which in splits else "" for which in ("train", "eval"))
    yield "loss, nats per pair", *(f"{part['loss']:.4f}" if "loss" in part else "" for part in parts)
    yield "pairs ranked right", *(f"{part['accuracy']:.1%}" if "accuracy" in part else "" for part in parts)
    yield "mean margin", *(f"{part['margin']:.3f}" if "margin" in part else "" for part in parts)
    yield ()
    too_long = sum(source["too_long"] for sources in card["data"]["sources"].values() for source in sources)
    yield "pairs left out as too long", f"{too_long:,}"
    yield "updates", f"{result['steps']:,}"
    yield "duration", f"{card['seconds']:,.0f} s"
