"""Stopping on request: SIGTERM, SIGINT, SIGUSR1 and SIGHUP end the run after its current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

STOPPED_EXIT_CODE = 75
"""Exit status of a run that was asked to stop and saved itself (sysexits.h: EX_TEMPFAIL, try again later)."""

_SECONDS_BETWEEN_INTERRUPTS = 2.0


class Stopped(Exception):
    """The run was asked to stop, and has saved itself or has nothing to save."""


class StopRequest:
    """Remembers a request to stop; the loops look at `requested` between steps.

    A second SIGINT ends the process at once. torchrun hands a Ctrl-C of the terminal on to processes that have seen
    it already, so only one that comes two seconds later or more counts as the second. SIGHUP, of a terminal that is
    closed, is left ignored where it is, as under nohup.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._first_interrupt = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return bool(self.signal_name)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
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
        self.signal_name = self.signal_name or signal.Signals(number).name
