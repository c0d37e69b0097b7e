"""Runs jobs, each after those it needs, in several processes; one that fails stops nothing but what needs it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal, NamedTuple

from l2d_bench.jobs import Job
from l2d_framework.errors import L2DError
from l2d_framework.training import interruption

_PAUSE = 0.2
"""Seconds between two reports of progress."""
_PATIENCE = 10.0
"""Seconds for a process to end by itself."""
_PROCESSES = multiprocessing.get_context("spawn")


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
    board = _Board(jobs, notify)
    if surroundings.workers == 0:
        while (key := board.take()) is not None:
            board.note(_do(jobs[key], notify))
    else:
        _in_processes(board, surroundings)
    return board.failures


class _Board:
    """What is to be done, what is done, and what failed."""

    def __init__(self, jobs: dict[str, Job], notify: Callable[[Event], None]) -> None:
        self.jobs, self.notify = jobs, notify
        self.failures: dict[str, str] = {}
        self._finished = {key for key, job in jobs.items() if job.is_done}
        self.waiting = unfinished(jobs)

    def take(self) -> str | None:
        """The next job that can be done now; those that need a failed one fail."""
        for key in list(self.waiting):
            broken = next((need for need in self.jobs[key].needs if need in self.failures), None)
            if broken is not None:
                self.waiting.remove(key)
                # The first cause, not the chain that led from it.
                cause = self.failures[broken]
                is_first = not cause.startswith("could not ")
                text = f"could not {self.jobs[broken].title}: {cause}" if is_first else cause
                self.note(Event("failed", key, text=text))
        ready = next((key for key in self.waiting if self._finished.issuperset(self.jobs[key].needs)), None)
        if ready is not None:
            self.waiting.remove(ready)
            self.notify(Event("started", ready))
        return ready

    def note(self, event: Event) -> None:
        """Take note of an event."""
        if event.kind == "failed":
            self.failures[event.key] = event.text
        elif event.kind == "done":
            self._finished.add(event.key)
        self.notify(event)


def unfinished(jobs: dict[str, Job]) -> list[str]:
    """What is to be done; what only finished jobs need is left out.

    Args:
        jobs: by key, each after those it needs.

    Returns:
        Keys in the same order.
    """
    finished = {key for key, job in jobs.items() if job.is_done}
    means = {need for job in jobs.values() for need in job.needs}
    wanted: set[str] = set()
    for key in reversed(jobs):
        if key not in finished and (key in wanted or key not in means):
            wanted |= {key, *jobs[key].needs} - finished
    return [key for key in jobs if key in wanted]


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
    """A process that does one job at a time.

    Not a `ProcessPoolExecutor`: when a process of one dies, all its jobs fail, and nothing says at which one or with
    what code it died; with a pool for each process, pipes for the progress and an end by force, that is the longer
    program.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        self.pipe, theirs = _PROCESSES.Pipe()
        # Torch and OpenMP read these when they are imported, in the process that is started here.
        with _environment("OMP_NUM_THREADS", str(surroundings.threads)):
            # No daemon, since those may not start processes of their own, as data loaders do.
            self.process = _PROCESSES.Process(target=_serve, args=(theirs, surroundings))
            self.process.start()
        theirs.close()
        self.key: str | None = None

    def start(self, job: Job) -> None:
        self.key = job.key
        with suppress(OSError):  # its process ended while it waited, as `_hear` will tell
            self.pipe.send(job)

    def end(self) -> None:
        """Ask it to end."""
        if self.key is None:
            self.pipe.close()
        else:
            # Open until it has ended: a run saves first, and tells of its progress meanwhile.
            self.process.terminate()

    def stop(self) -> None:
        """Wait until it has ended, a run until it has saved, and end it by force if it does not."""
        self.process.join(_PATIENCE if self.key is None else _PATIENCE + interruption.GRACE)
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _in_processes(board: _Board, surroundings: Surroundings) -> None:
    workers = [_Worker(surroundings) for _ in range(min(surroundings.workers, len(board.waiting)))]
    try:
        while board.waiting or any(worker.key for worker in workers):
            for worker in workers:
                if worker.key is None and (key := board.take()) is not None:
                    worker.start(board.jobs[key])
            busy = {worker.pipe: number for number, worker in enumerate(workers) if worker.key}
            for pipe in wait(list(busy)) if busy else ():
                number = busy[pipe]  # type: ignore[index]
                event = _hear(workers[number])
                if event.kind != "running":
                    workers[number].key = None
                    if not workers[number].process.is_alive():
                        workers[number] = _Worker(surroundings)
                board.note(event)
    finally:
        for worker in workers:
            worker.end()
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
