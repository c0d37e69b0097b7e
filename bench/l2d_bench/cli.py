"""`l2d bench`: the papers' tables at one size, beside the papers' numbers."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l2d_framework.errors import ConfigError, interrupt

if TYPE_CHECKING:
    from rich.console import Console

    from l2d_bench.bench import Bench
    from l2d_bench.cells import Filled
    from l2d_bench.pool import Surroundings
    from l2d_bench.schema import ProfileFile

_ALL = "all"
_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""
_INTERRUPTED = 130
"""Exit code that shells give to what Ctrl-C ended."""


_HELP = """Run rows of the papers' tables, beside the papers' numbers.

Started again with the same --out, it goes on at what is missing. Models and results are shared between tables.
Exit code 1 if a cell failed; the others are there all the same. Interrupted, it writes what there is."""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(name="bench", help=_HELP)
def bench(
    tables: Annotated[
        list[str] | None, typer.Argument(help="Ids of tables, YAML files, or `all`.", metavar="TABLE")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="A name that --list shows, such as tiny, or a YAML file or folder of one.")
    ] = "tiny",
    out: Annotated[Path, typer.Option(help="Folder for models, results and tables; shared between tables.")] = Path(
        "l2d-bench"
    ),
    seeds: Annotated[str | None, typer.Option(help="Instead of the profile's, such as 1,2,3.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that work side by side; 0 for this one.")] = 1,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with data sets named like on the hub, read instead of it; relative paths in a profile are "
            "read from there, too."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long and write what there is; the same command goes on.")
    ] = None,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Run, in a sandbox, programs that models write.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Check tables and profile, list the work, do none.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="List tables and profiles.")] = False,
) -> None:
    """`l2d bench`.

    Args:
        tables: ids.
        profile: name or file.
        out: folder.
        seeds: comma-separated.
        workers: processes.
        data: working folder of the jobs.
        minutes: to work for.
        confirm_run_unsafe_code: consent to tasks that run what a model writes.
        check: only check.
        listed: only list.

    Raises:
        ConfigError: if no table is named, or a table, the profile or an option is wrong.
        Exit: with code 1 if a cell failed, 130 or 143 if it was interrupted.
    """
    from rich.console import Console

    from l2d_bench.bench import Bench
    from l2d_bench.files import profile_names, table_ids
    from l2d_bench.pool import Surroundings, quieten
    from l2d_framework.training.folder_lock import locked

    console = Console()
    if listed:
        _list(console)
        return
    if not tables:
        raise ConfigError("Name a table, or `all`. `l2d bench --list` shows them.")
    start = time.monotonic()
    out = out.expanduser().absolute()
    if profile not in profile_names() and Path(profile).exists():
        profile = str(Path(profile).absolute())
    tables = [str(Path(table).absolute()) if table.endswith(".yaml") else table for table in tables]
    _enter(data)
    if confirm_run_unsafe_code:
        from l2d_framework.evaluation.code.sandbox import CONSENT

        os.environ[CONSENT] = "1"  # workers inherit it
    ids = table_ids() if tables == [_ALL] else tables
    made = Bench(ids, profile, out, seeds=_seeds(seeds))
    if check:
        _show_work(console, made)
        return
    quieten(made.profile.threads)
    surroundings = Surroundings(workers, made.profile.threads, made.device, Path.cwd(), out / "logs")
    with locked(out, "--out"):
        failures: dict[str, str] = {}
        code = 0
        over = _Alarm(None if minutes is None else 60 * minutes - (time.monotonic() - start))
        # `timeout` and batch systems end a process by this signal.
        signal.signal(signal.SIGTERM, interrupt)
        try:
            with over:
                made.prepare()
                failures = _run(console, made, surroundings)
        except KeyboardInterrupt as stop:
            what = "The time is over" if over.has_struck else "Interrupted"
            console.print(f"{what}; the tables hold what there is. The same command goes on.")
            code = 0 if over.has_struck else getattr(stop, "exit_code", _INTERRUPTED)
        has_failed = _finish(console, made, failures, _facts(surroundings, time.monotonic() - start))
        if code or has_failed:
            raise typer.Exit(code or 1)


class _Alarm:
    """Interrupts what takes longer, as SIGTERM does; None for no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.has_struck = seconds, False

    def __enter__(self) -> None:
        if self.seconds is not None:
            self._before = signal.signal(signal.SIGALRM, self._strike)
            signal.setitimer(signal.ITIMER_REAL, max(self.seconds, 1e-3))

    def _strike(self, *_: object) -> None:
        self.has_struck = True
        # Whoever listens to it, such as a run that saves first, does so now, too. SIGINT is ignored in the background.
        signal.raise_signal(signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        if self.seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)


def _finish(console: Console, made: Bench, failures: dict[str, str], facts: dict[str, object]) -> bool:
    """Write and show the tables; returns whether a cell of any lacks its number because something failed."""
    tables = made.fill(failures)
    for filled in tables:
        files = made.write(filled, facts)
        _show(console, filled, made.profile)
        console.print(f"Written: {', '.join(str(path) for path in files)}", highlight=False, soft_wrap=True)
    return any(filled.has_failed for filled in tables)


def _seeds(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds must be whole numbers with commas between them, got {text!r}.") from error


def _enter(data: Path | None) -> None:
    if data is None:
        return
    try:
        os.chdir(data.expanduser())
    except OSError as error:
        raise ConfigError(f"--data {str(data)!r} is no folder that can be entered ({error.strerror}).") from error
    # Folders there are named like packages, such as `openai`.
    sys.path[:] = [entry for entry in sys.path if entry not in ("", ".")]


def _list(console: Console) -> None:
    from rich import box
    from rich.table import Table

    from l2d_bench.files import own_table_ids, profile_names, read_profile, read_table, table_ids

    shown = Table("table", "title", "of the paper", box=box.SIMPLE_HEAD)
    for name in (*table_ids(), *own_table_ids()):
        table = read_table(name)
        shown.add_row(name, table.title, table.reference)
    console.print(shown)
    shown = Table("profile", "title", "seeds", box=box.SIMPLE_HEAD)
    for name in profile_names():
        profile = read_profile(name)
        shown.add_row(name, profile.title, ", ".join(map(str, profile.seeds)))
    console.print(shown)


def _show_work(console: Console, made: Bench) -> None:
    jobs = made.jobs.values()
    for job in jobs:
        console.print(f"{'done' if job.is_done else 'to do':6} {job.title}", highlight=False, soft_wrap=True)
    console.print(f"{sum(job.is_done for job in jobs)} of {len(jobs)} jobs are done.", highlight=False)
    for filled in made.fill({}):
        for name in filled.plan.columns:
            reasons = {
                cell.text for (_, column), cell in filled.cells.items() if column == name and cell.reason == "no data"
            }
            for reason in sorted(reasons):
                console.print(f"{filled.plan.id}, {name}: no data: {reason}", highlight=False, soft_wrap=True)


def _run(console: Console, made: Bench, surroundings: Surroundings) -> dict[str, str]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from l2d_bench.pool import Event, run_jobs

    jobs = made.jobs
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        done = sum(job.is_done for job in jobs.values())
        whole = bar.add_task("all jobs", total=len(jobs), completed=done, facts="")
        open_tasks: dict[str, TaskID] = {}
        began: dict[str, float] = {}
        said = time.monotonic()

        def say(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        def notify(event: Event) -> None:
            nonlocal said
            title = jobs[event.key].title
            if event.kind == "started":
                began[event.key] = time.monotonic()
                open_tasks[event.key] = bar.add_task(title, total=None, facts="")
            elif event.kind == "running":
                bar.update(open_tasks[event.key], completed=event.done, total=event.total, facts=event.text)
                if not console.is_terminal and time.monotonic() - said > _EVERY:
                    said = time.monotonic()
                    say(f"{title}: {event.done}/{event.total} {event.text}".rstrip())
            else:
                bar.advance(whole)
                if event.key in open_tasks:
                    bar.remove_task(open_tasks.pop(event.key))
                seconds = time.monotonic() - began.get(event.key, time.monotonic())
                text = f"failed: {event.text}" if event.kind == "failed" else f"done in {seconds:.0f} s"
                say(f"{title}: {text}")

        return run_jobs(jobs, surroundings, notify)


def _facts(surroundings: Surroundings, seconds: float) -> dict[str, object]:
    from l2d_bench.files import commit
    from l2d_framework.training.run_record import environment

    return {
        "workers": surroundings.workers,
        "threads_per_worker": surroundings.threads,
        "device": surroundings.device,
        "seconds_of_this_session": round(seconds, 1),
        **environment(max(1, surroundings.workers)),
        "commit": commit(),
    }


def _show(console: Console, filled: Filled, profile: ProfileFile) -> None:
    from l2d_bench.report import notes, printed, rows
    from l2d_framework.evaluation.tables import terminal

    own = (filled.plan.table.title, rows(filled, profile))
    theirs = [(f"The paper prints: {title}", table) for title, table in printed(filled)]
    for title, table in (own, *theirs):
        console.print(terminal(table, title))
    for note in notes(filled, profile):
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)
