"""How long a training will take, told once after its first iterations."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta

from detection.reporting.words import duration

UNTIMED_ITERATIONS = 10  # slower than the rest: kernels are chosen, memory is claimed, files are opened
TOLD_AFTER_ITERATIONS = 100


class Forecast:
    """Times the first iterations of a process, and says once how long the remaining ones will take.

    The iterations up to the first report at or after UNTIMED_ITERATIONS are left out, and so is time handed to
    `leave_out`: a validation is no training.
    """

    def __init__(
        self,
        done: int,
        total: int,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """
        Args:
            done: iterations before this process's first one.
            total: iterations of the whole run.
        """
        self._first, self._total = done, total
        self._clock, self._now = clock, now
        self._timed_from: tuple[int, float] | None = None
        self._is_told = total - done < 2 * TOLD_AFTER_ITERATIONS  # over before a forecast would help

    def leave_out(self, seconds: float) -> None:
        """`seconds` since the last report went into something else."""
        if self._timed_from is not None:
            self._timed_from = (self._timed_from[0], self._timed_from[1] + seconds)

    def report(self, done: int) -> str | None:
        """After iteration `done` (counted over the whole run): the forecast, when it is time for it."""
        if self._is_told or done - self._first < UNTIMED_ITERATIONS:
            return None
        if self._timed_from is None:
            self._timed_from = (done, self._clock())
            return None
        if done - self._first < TOLD_AFTER_ITERATIONS:
            return None
        self._is_told = True
        since, started = self._timed_from
        pace = (self._clock() - started) / (done - since)
        seconds = pace * (self._total - done)
        end = self._now() + timedelta(seconds=seconds)
        return (
            f"after {done - self._first} iterations: {pace:.3g} s each, so the remaining {self._total - done:,} take "
            f"about {duration(seconds)}, to {end:%a %d %b %H:%M}; validations come on top"
        )
