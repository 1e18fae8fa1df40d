"""Trackers: where a run's figures go besides TensorBoard and metrics.jsonl, and the thread that feeds one."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from detection.reporting.disk import write_whole

MOST_WAITING = 10_000
"""Calls that wait for a slow tracker; what comes while as many wait is left out."""
CLOSING_SECONDS = 20.0
"""How long the end of a run waits for a tracker to take the rest."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    name: of the output directory. configuration: the run's settings in plain types, nested dictionaries. iteration:
    where this start begins. identifier: what `start` returned when the run began; None: the run is new.
    """

    name: str
    directory: Path
    configuration: Mapping[str, Any]
    iteration: int
    identifier: str | None = None


class Tracker(Protocol):
    """What a tracker can do. All calls come from one thread of the main process, in this order.

    Whatever a call raises, and however long it takes, the training goes on.
    """

    def start(self, run: TrackedRun) -> str:
        """Begin, or go on with the run `run.identifier`; an identifier, which a resumed run is given back."""

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Figures by tag (train/loss, val/mAP, val/AP/<class>) after `iteration`, counted from 0 over the whole run. A
        resumed run repeats the iterations after its checkpoint."""

    def images(self, iteration: int, tag: str, images: Sequence[np.ndarray]) -> None:
        """Images of a tag, uint8 RGB [H, W, 3] each."""

    def finish(self, is_done: bool) -> None:
        """The end. is_done: the run has come to its last iteration, rather than been stopped."""


class TrackerFeed:
    """Passes calls on to a tracker in a thread. Neither an exception nor a tracker that hangs reaches the training: the
    first of them is warned of."""

    def __init__(
        self, name: str, tracker: Tracker, run: TrackedRun, identifier_file: Path, warn: Callable[[str], None]
    ) -> None:
        """
        Args:
            identifier_file: in the output directory; holds what the tracker calls the run.
            warn: says a line, and is called by the thread that uses this object.
        """
        self.name = name
        self._tracker = tracker
        self._file = identifier_file
        with contextlib.suppress(FileNotFoundError):
            run = replace(run, identifier=identifier_file.read_text().strip() or None)
        self._run = run
        self._warn = warn
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._has_warned = False
        self._has_failed = False

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        # Only now: whatever is forked at the start of a training must not find a thread at work.
        self._start()
        self._pass_on(lambda: self._tracker.scalars(iteration, values))

    def images(self, iteration: int, tag: str, images: Sequence[np.ndarray]) -> None:
        self._pass_on(lambda: self._tracker.images(iteration, tag, images))

    def close(self, is_done: bool) -> None:
        """Wait until the tracker has everything, CLOSING_SECONDS at most."""
        deadline = time.monotonic() + CLOSING_SECONDS
        self._start()
        assert self._thread is not None
        with contextlib.suppress(queue.Full):
            for call in (lambda: self._tracker.finish(is_done), None):
                self._waiting.put(call, timeout=max(deadline - time.monotonic(), 0))
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            self._problem = f"it has not taken everything within {CLOSING_SECONDS:g} seconds; the rest is lost there"
        self._warn_of_problem()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self._thread.start()

    def _pass_on(self, call: Callable[[], None]) -> None:
        self._warn_of_problem()
        if not self._has_failed:
            try:
                self._waiting.put_nowait(call)
            except queue.Full:
                self._problem = f"it is too slow: {MOST_WAITING:,} calls wait, and what comes now is left out there"

    def _warn_of_problem(self) -> None:
        if self._problem is not None and not self._has_warned:
            self._has_warned = True
            kept = "the training goes on, and TensorBoard and metrics.jsonl have everything"
            self._warn(f"tracker {self.name}: {self._problem}; {kept}")

    def _work(self) -> None:
        try:
            identifier = self._tracker.start(self._run)
            write_whole(self._file, f"{identifier}\n".encode())
        # SystemExit too: some clients end the program over a missing key.
        except (Exception, SystemExit) as error:
            self._has_failed = True
            self._problem = f"the run could not be begun there: {_first_line(error)}"
        while (call := self._waiting.get()) is not None:
            if self._has_failed:
                continue
            try:
                call()
            except (Exception, SystemExit) as error:
                self._problem = self._problem or _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
