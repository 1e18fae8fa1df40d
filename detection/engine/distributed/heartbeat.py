"""Signs of life: each process of a run knows what the others are doing when one of them is lost or stuck.

A collective that fails says "connection reset by peer" or "timed out", but not which process failed. So each process
writes a sign of life and what it is doing into the run's key-value store every second. A process that waits too long
for the others says who is missing and what it waited for, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from detection.errors import DetectionError

BEAT_SECONDS = 1.0
_PATIENCE_BEATS = 3
"""So many beats without a new sign, and a process counts as gone."""
STORE_SECONDS = 5.0
"""How long the store may take for an answer. Its own calls wait for hours where the network loses packets."""

_MARKS = ("gloo", "nccl", "connection closed", "connection reset", "connection was", "timed out", "broken pipe")
_NETWORK_ERRORS = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)

T = TypeVar("T")
Sign = dict[str, Any] | None
"""What a process has last written: beats, pid, host, at, waits_for, last_words. None: nothing, or it cannot be read."""


class LostProcess(DetectionError):
    """Another process of the run is gone or stuck. The message names it, and what was waited for."""


def is_network_error(error: BaseException) -> bool:
    """Whether a collective failed, rather than a computation."""
    if isinstance(error, _NETWORK_ERRORS):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in _MARKS)


class Heartbeat:
    """This process's signs of life, and its view of the others'.

    `limit`: how long a wait for the others may take where `waiting` is not told otherwise.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, limit: timedelta) -> None:
        self._store = store
        self._unanswered = threading.Thread()
        self._rank, self._world_size = rank, world_size
        self._limit = limit.total_seconds()
        self._at = "starting"
        self._waits_for: str | None = None
        self._allowed = self._limit
        self._waits_since = 0.0
        self._beats = 0
        self._last_words: str | None = None
        self._is_stopping: Callable[[], bool] = lambda: False
        self._stop: Callable[[], None] = lambda: None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True, name="heartbeat")
        self._sign()
        self._thread.start()

    def at(self, place: str) -> None:
        """Note what this process is doing; costs nothing."""
        self._at = place

    def share_stop(self, is_stopping: Callable[[], bool], stop: Callable[[], None]) -> None:
        """From now on, where `is_stopping` is true on one process, `stop` is called in a thread of every other one,
        within two beats. So a process hears of it that waits for something else than the others."""
        self._is_stopping, self._stop = is_stopping, stop

    @contextlib.contextmanager
    def waiting(self, what: str, limit: timedelta | None = None) -> Iterator[None]:
        """Inside, this process waits for the others; longer than `limit`, and it ends with a message."""
        if self._waits_for is not None:  # one wait inside another: the outer one's name says more
            yield
            return
        self._allowed = self._limit if limit is None else limit.total_seconds()
        self._waits_since = time.monotonic()
        self._waits_for = what
        try:
            yield
        except BaseException:
            self._waits_since = float("inf")  # what was waited for stays known to `report`
            raise
        self._waits_for = None

    def report(self, reason: str) -> str:
        """The message of a wait that failed. Takes a few seconds, to look for signs of the others."""
        waits_for = self._waits_for
        before = self._signs()
        for _ in range(_PATIENCE_BEATS):
            time.sleep(BEAT_SECONDS)
            self._sign()  # the others may be looking too, and this may be the thread that does it
        after = self._signs()
        missing: list[str] = []
        elsewhere: list[str] = []
        if not any(after):
            missing.append(
                "no process can be asked: the store of the run, on process 0's machine, does not answer; "
                "process 0 or its torchrun has ended, or the network to its machine has failed"
            )
        for rank, (old, new) in enumerate(zip(before, after, strict=True)):
            if rank == self._rank:
                continue
            if new is None:
                missing += [f"process {rank} has given no sign of life"] if any(after) else []
                continue
            who = f"process {rank} (pid {new['pid']} on {new['host']})"
            if new["last_words"] is not None:
                missing.append(f"{who} ended {new['at']}: {new['last_words']}")
            elif old is not None and old["beats"] == new["beats"]:
                missing.append(f"{who} gives no sign of life; the last was {new['at']}")
            elif waits_for is not None and new["waits_for"] != waits_for:
                doing = f"waits for {new['waits_for']}" if new["waits_for"] else "does not wait"
                elsewhere.append(f"{who} is alive and elsewhere: {new['at']}, {doing}")
        lines = [
            f"process {self._rank}, {self._at}, waited for {waits_for or 'the others'} without an answer: {reason}"
        ]
        lines += [f"  {line}" for line in missing + elsewhere]
        if not missing and not elsewhere:
            lines.append("  all processes are alive; the network between them may have failed for a moment")
        lines.append(
            "Its own message stands above, or in its output. Continue with --resume; torchrun --max-restarts=N does so."
        )
        return "\n".join(lines)

    def close(self, last_words: str | None = None) -> None:
        """Leave; `last_words`: why, where it is before the end."""
        self._last_words = last_words
        self._over.set()
        self._thread.join(BEAT_SECONDS)
        if last_words is not None:
            self._sign()

    def _beat_on(self) -> None:
        looked_for, looked_at, before = 0.0, 0.0, None
        while not self._over.wait(BEAT_SECONDS):
            self._sign()
            self._pass_on_stop()
            since, now = self._waits_since, time.monotonic()
            if self._waits_for is None or now < since:
                continue
            if now - since >= self._allowed:
                self._end_here(since)
            # gloo does not notice every death. What may take hours is waited for only while all give signs of life.
            if looked_for != since:
                looked_for, looked_at, before = since, since, None
            if now - looked_at >= self._limit / 2:
                after = self._signs()
                if before is not None and any(map(self._is_lost, range(self._world_size), before, after)):
                    self._end_here(since)
                looked_at, before = now, after

    def _is_lost(self, rank: int, before: Sign, after: Sign) -> bool:
        if rank == self._rank:
            return False
        # Nothing at all: it never gave a sign, or the store has ended with process 0, perhaps before the first look.
        return after is None or (before is not None and before["beats"] == after["beats"])

    def _end_here(self, since: float) -> None:
        # The main thread hangs in a collective, from which nothing but the end of the process brings it back.
        minutes = (time.monotonic() - since) / 60
        text = self.report(f"nothing came for {minutes:.2g} minutes (--collective-timeout {self._limit / 60:g})")
        if self._waits_for is None or self._waits_since != since:  # it came after all
            return
        self._last_words = f"gave up waiting for {self._waits_for}"
        self._sign()
        print(f"\nerror: {text}", file=sys.stderr, flush=True)
        os._exit(1)

    def _sign(self) -> None:
        self._beats += 1
        sign = {
            "beats": self._beats,
            "pid": os.getpid(),
            "host": platform.node(),
            "at": self._at,
            "waits_for": self._waits_for,
            "last_words": self._last_words,
        }
        text = json.dumps(sign)
        self._ask(lambda: self._store.set(str(self._rank), text), None)

    def _pass_on_stop(self) -> None:
        if self._is_stopping():
            self._ask(lambda: self._store.set("stop", ""), None)
        elif self._ask(lambda: self._store.check(["stop"]), False):
            self._stop()

    def _signs(self) -> list[Sign]:
        """The latest sign of each process; None where the store does not answer or it never gave any."""

        def read(rank: int) -> Sign:
            return json.loads(self._store.get(str(rank))) if self._store.check([str(rank)]) else None

        return self._ask(lambda: [read(rank) for rank in range(self._world_size)], [None] * self._world_size)

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        """What the store answers; `otherwise` where it takes too long, or has ended with the process that keeps it."""
        answer = otherwise

        def ask() -> None:
            nonlocal answer
            with contextlib.suppress(RuntimeError, ValueError):
                answer = question()

        if not self._unanswered.is_alive():
            asking = threading.Thread(target=ask, daemon=True, name="heartbeat's question")
            asking.start()
            asking.join(STORE_SECONDS)
            if asking.is_alive():
                self._unanswered = asking
        return answer


def start_heartbeat(start: str, rank: int, world_size: int, limit: timedelta) -> Heartbeat:
    """Begin the signs of life, over a connection of their own to the store that the run's processes met at."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
    # torchrun keeps its store over restarts: signs of an earlier start are not these.
    return Heartbeat(dist.PrefixStore(f"heartbeat/{start}", store), rank, world_size, limit)
