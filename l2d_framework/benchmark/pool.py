"""Runs jobs, each after those it needs, in several processes; one that fails stops nothing but what needs it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from l2d_framework.benchmark.jobs import Job
from l2d_framework.errors import L2DError

_PAUSE = 0.2
"""Seconds between two reports of progress."""


class Event(NamedTuple):
    """What happened to a job: `done` of `total` and a few words of a "running" one, the message of a "failed" one."""

    kind: Literal["started", "running", "done", "failed"]
    key: str
    done: int = 0
    total: int = 0
    text: str = ""


@dataclass(frozen=True)
class Surroundings:
    """What jobs are done in.

    Attributes:
        workers: processes; 0 for this one.
        threads: of torch in each.
        device: "cpu" hides the GPUs of the machine.
        folder: working directory, where data sets are looked for first; this one when None.
        logs: where each process writes what libraries print; to this terminal when None.
    """

    workers: int = 1
    threads: int = 1
    device: str = "cpu"
    folder: Path | None = None
    logs: Path | None = None


def run_jobs(jobs: dict[str, Job], surroundings: Surroundings, notify: Callable[[Event], None]) -> dict[str, str]:
    """Do what is not done yet.

    Args:
        jobs: by key, each after those it needs.
        surroundings: where.
        notify: told what happens.

    Returns:
        By key, why jobs failed, those among them that need a failed one.
    """
    failures: dict[str, str] = {}
    finished = {key for key, job in jobs.items() if job.is_done}
    waiting = _needed(jobs, finished)
    if surroundings.workers == 0:
        for key in waiting:
            if not _blocked(jobs[key], jobs, failures, notify):
                notify(Event("started", key))
                _note(_do(jobs[key], notify), failures, notify)
        return failures
    _in_processes(jobs, finished, waiting, surroundings, failures, notify)
    return failures


def _needed(jobs: dict[str, Job], finished: set[str]) -> list[str]:
    """What is to be done, in order; what only finished jobs need is left out."""
    means = {need for job in jobs.values() for need in job.needs}
    wanted: set[str] = set()
    for key in reversed(jobs):
        if key not in finished and (key in wanted or key not in means):
            wanted |= {key, *jobs[key].needs} - finished
    return [key for key in jobs if key in wanted]


def _blocked(job: Job, jobs: Mapping[str, Job], failures: dict[str, str], notify: Callable[[Event], None]) -> bool:
    broken = next((need for need in job.needs if need in failures), None)
    if broken is None:
        return False
    # The first cause, not the chain that led from it.
    cause = failures[broken] if failures[broken].startswith("could not ") else None
    _note(
        Event("failed", job.key, text=cause or f"could not {jobs[broken].title}: {failures[broken]}"), failures, notify
    )
    return True


def _note(event: Event, failures: dict[str, str], notify: Callable[[Event], None]) -> None:
    if event.kind == "failed":
        failures[event.key] = event.text
    notify(event)


def _do(job: Job, notify: Callable[[Event], None]) -> Event:
    last = 0.0

    def report(done: int, total: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > _PAUSE:
            last = time.monotonic()
            notify(Event("running", job.key, done, total, text))

    try:
        job.do(report)
    except L2DError as error:
        return Event("failed", job.key, text=str(error))
    except Exception as error:
        logging.getLogger(__name__).error("%s failed:\n%s", job.title, traceback.format_exc())
        return Event("failed", job.key, text=f"{type(error).__name__}: {error}")
    return Event("done", job.key)


class _Worker:
    """A process that does one job at a time."""

    def __init__(self, surroundings: Surroundings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # Torch and OpenMP read these when they are imported, in the process that is started here.
        with _environment({"OMP_NUM_THREADS": str(surroundings.threads)}):
            self.process = context.Process(target=_serve, args=(theirs, surroundings), daemon=True)
            self.process.start()
        theirs.close()
        self.key: str | None = None

    def start(self, job: Job) -> None:
        self.key = job.key
        self.pipe.send(job)

    def stop(self) -> None:
        self.pipe.close()
        if self.key is not None:
            self.process.terminate()
        self.process.join()


class _environment:
    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._values}
        os.environ.update(self._values)

    def __exit__(self, *error: Any) -> None:
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _in_processes(
    jobs: Mapping[str, Job],
    finished: set[str],
    waiting: list[str],
    surroundings: Surroundings,
    failures: dict[str, str],
    notify: Callable[[Event], None],
) -> None:
    workers = [_Worker(surroundings) for _ in range(min(surroundings.workers, len(waiting)))]
    try:
        while waiting or any(worker.key for worker in workers):
            for key in [key for key in waiting if _blocked(jobs[key], jobs, failures, notify)]:
                waiting.remove(key)
            for worker in workers:
                ready = next((key for key in waiting if finished.issuperset(jobs[key].needs)), None)
                if worker.key is None and ready is not None:
                    waiting.remove(ready)
                    notify(Event("started", ready))
                    worker.start(jobs[ready])
            busy = {worker.pipe: number for number, worker in enumerate(workers) if worker.key}
            for pipe in wait(list(busy)):
                number = busy[pipe]  # type: ignore[index]
                event = _hear(workers[number])
                if event.kind == "running":
                    notify(event)
                    continue
                if event.kind == "done":
                    finished.add(event.key)
                workers[number].key = None
                _note(event, failures, notify)
                if not workers[number].process.is_alive():
                    workers[number] = _Worker(surroundings)
    finally:
        for worker in workers:
            worker.stop()


def _hear(worker: _Worker) -> Event:
    try:
        return Event(*worker.pipe.recv())
    except (EOFError, ConnectionError):
        worker.process.join()
        return Event("failed", str(worker.key), text=f"its process ended with code {worker.process.exitcode}")


def _serve(pipe: Connection, surroundings: Surroundings) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if surroundings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if surroundings.logs is not None:
        surroundings.logs.mkdir(parents=True, exist_ok=True)
        log = os.open(surroundings.logs / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
    if surroundings.folder is not None:
        os.chdir(surroundings.folder)
    quieten(surroundings.threads)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(tuple(_do(job, lambda event: pipe.send(tuple(event)))))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    # The main thread may be in the middle of a job, which is done again later.
    os._exit(1)


def quieten(threads: int) -> None:
    """Make libraries in this process keep to themselves, and to some threads.

    Args:
        threads: of torch.
    """
    import warnings

    import datasets
    import torch
    import transformers

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("l2d_framework").setLevel(logging.ERROR)
