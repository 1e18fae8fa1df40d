"""Stopping on request: SIGTERM, SIGINT, SIGUSR1 and SIGHUP end the run after its current step, with a checkpoint.

A wait for data is no step: it ends at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

STOPPED_EXIT_CODE = 75
"""Exit status of a run that was asked to stop and saved itself (sysexits.h: EX_TEMPFAIL, try again later)."""

_SECONDS_BETWEEN_INTERRUPTS = 2.0
_WAKE = signal.SIGURG
"""Brings the main thread out of a wait. The system ignores it where nobody listens any more."""


class Stopped(Exception):
    """The run was asked to stop, and has saved itself or has nothing to save."""


class Interrupted(BaseException):
    """A wait was given up because the run was asked to stop. No `except Exception` on the way may take it for one."""


class StopRequest:
    """Remembers a request to stop; the loops look at `requested` between steps, and wait inside `interrupting`.

    A second SIGINT ends the process at once. torchrun hands a Ctrl-C of the terminal on to processes that have seen
    it already, so only one that comes two seconds later or more counts as the second. SIGHUP, of a terminal that is
    closed, is left ignored where it is, as under nohup.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        """Of the signal to this process; empty where another process passed on its own."""
        self._asked_elsewhere = False
        self._interrupts = False
        self._first_interrupt = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self._asked_elsewhere or bool(self.signal_name)

    def request_from_elsewhere(self) -> None:
        """Stop because another process was asked to; called in any thread."""
        if not self.requested:
            self._asked_elsewhere = True
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, the main thread waits for something that a stop can do without, and for no other process.

        Raises:
            Interrupted: out of the wait as soon as there is a request; at once where there is one already.
        """
        self._interrupts = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._interrupts = False

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, _WAKE):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt and now - self._first_interrupt >= _SECONDS_BETWEEN_INTERRUPTS:
                os._exit(128 + signal.SIGINT)
            self._first_interrupt = self._first_interrupt or now
        if number != _WAKE:
            self.signal_name = self.signal_name or signal.Signals(number).name
        if self._interrupts and self.requested:
            self._interrupts = False
            raise Interrupted
