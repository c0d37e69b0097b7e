"""Signals while training: the update on its way is ended and saved before the process ends.

Python runs the handler of a signal between two lines of Python, and a backward pass, one line, may take minutes. So a
thread hears of it as well, and answers where the handler is kept waiting.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from l2d_framework.errors import Interrupted, interrupt

GRACE = 300.0
"""Seconds for an update to end; what supervisors allow is theirs to enforce."""
PATIENCE = 0.5
"""Seconds for the handler of a signal to be run, before the thread answers."""
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_PLAIN = (signal.SIG_DFL, signal.default_int_handler, interrupt)
"""Handlers that end a process at once; whoever has set another wants the signal for himself."""


class Interruption:
    """Notes the first of the signals that ask to end, while it is entered in the main thread."""

    def __init__(self) -> None:
        self.signum = 0
        """The signal; 0 while there was none."""
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None
        self._is_updating = self._is_reading = self._is_over = False
        self._answered = 0  # signal that the thread has answered
        self._noted = 0  # times that the handler was run
        self._listener: threading.Thread | None = None
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.getsignal(n) for n in _SIGNALS if signal.getsignal(n) in _PLAIN}
            for signum in self._before:
                signal.signal(signum, self._note)
            self._ear, self._bell = socket.socketpair()
            self._bell.setblocking(False)
            self._bell_before = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ends()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._is_over = True
        if self._listener is not None:
            signal.set_wakeup_fd(self._bell_before)
            self._bell.send(bytes(1))
            self._listener.join()
            self._bell.close()
            self._ear.close()

    def begins(self) -> None:
        """Hear that an update has begun; after a signal it is the last, and is waited for so long."""
        self._is_updating = True
        if self.signum:
            self._wait()

    def ends(self) -> None:
        """Hear that the update has ended; what is measured and saved then takes its time."""
        self._is_updating = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Wait for what an update is made of; a signal, also one from before, ends that at once.

        Raises:
            Interrupted: by the signal.
        """
        self._is_reading = True
        try:
            if self.signum:
                raise Interrupted(self.signum)
            yield
        finally:
            self._is_reading = False

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(GRACE, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _listen(self) -> None:
        """Answer signals for which the handler is not run in time."""
        rung = 0
        while (signum := self._ear.recv(1)[0]) and not self._is_over:
            if signum not in self._before:
                continue
            rung += 1
            end = time.monotonic() + PATIENCE
            while self._noted < rung and time.monotonic() < end and not self._is_over:
                time.sleep(0.01)
            if self._noted < rung and not self._is_over:
                self._answer(signum)

    def _answer(self, signum: int) -> None:
        if not (self.signum or self._answered):
            self._answered = signum
            _say(_promise(signum))
            if self._is_updating:
                self._wait()
        elif signum == signal.SIGINT:
            _say("Ctrl-C once more: ended at once. The same command goes on from what was saved.")
            os._exit(Interrupted(signum).exit_code)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that loads data, which ends with its parent
            return
        self._noted += 1
        if self.signum:
            # Launchers pass a signal on that the whole group has got already; a person who asks twice means it.
            if signum == signal.SIGINT:
                raise Interrupted(signum)
            return
        self.signum = signum
        if self._is_updating:
            self._wait()
        if self._is_reading:
            _say(f"{name_of(signum)}: saving.")
            raise Interrupted(signum)
        if not self._answered:
            _say(_promise(signum))

    def _end(self) -> None:
        if not self._is_updating:  # it has ended while the thread was answering
            return
        _say(
            f"The update has not ended within {GRACE:.0f} s and is lost. The same command goes on from what was saved."
        )
        os._exit(Interrupted(self.signum or self._answered).exit_code)


def name_of(signum: int) -> str:
    """What a person calls a signal."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def _promise(signum: int) -> str:
    again = ", Ctrl-C once more ends at once" if signum == signal.SIGINT else ""
    return f"{name_of(signum)}: saving when this update has ended{again}."


def _say(text: str) -> None:
    # Not by way of a buffer that the interrupted code may be writing to.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())


def _deafen() -> None:
    """In a worker that was forked, whose signals would ring here."""
    signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_deafen)
