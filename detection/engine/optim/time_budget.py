"""A training that ends in time: the rest of the schedule in the iterations that are left."""

from __future__ import annotations

import time
from collections.abc import Callable

from detection.engine.distributed.comm import Processes


class TimeBudget:
    """Counts the hours of a training, and tells by its pace how many iterations are left."""

    def __init__(self, hours: float, processes: Processes, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: seconds; the main process's counts.
        """
        self.hours = hours
        self._processes = processes
        self._clock = clock
        self._counted = clock()
        self._validation_seconds = 0.0
        self._paced: list[tuple[int, float]] = []

    def note_validation(self, seconds: float) -> None:
        """How long the last validation took: the time for one is kept back."""
        self._validation_seconds = seconds

    def counted(self, seconds: float) -> float:
        """The seconds until now, from those at the last call of this or of `left`."""
        now = self._clock()
        seconds, self._counted = seconds + now - self._counted, now
        return seconds

    def left(self, iteration: int, seconds: float) -> tuple[float, int | None]:
        """After `iteration` iterations, and `seconds` at the last call: the seconds until now, and how many more
        iterations fit into the hours (None: the pace is not known yet). Collective.
        """
        seconds, kept_back = self._processes.broadcast((self.counted(seconds), self._validation_seconds))
        # The first iterations are slower than the rest. Until there are others, they are all that is known.
        self._paced = [*self._paced[:2], (iteration, seconds)]
        first, began = self._paced[1 if len(self._paced) == 3 else 0]
        if iteration == first:
            return seconds, None
        pace = (seconds - began) / (iteration - first)
        return seconds, max(int((self.hours * 3600 - seconds - kept_back) / max(pace, 1e-9)), 0)
