"""A training that ends in time: the rest of the schedule in the iterations that are left."""

from __future__ import annotations

import time
from collections.abc import Callable

from detection.engine.distributed.comm import Processes
from detection.engine.train_state import TrainState


class TimeBudget:
    """Counts the hours of a training, and plans its last iteration by its pace.

    The plan is part of the training's progress: a resumed run follows the one in its checkpoint, and goes on from the
    hours that this had counted.
    """

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

    def plan(self, state: TrainState) -> str | None:
        """Count the time since the last call, and plan how the rest fits; collective. A line where a plan is new."""
        progress, now = state.progress, self._clock()
        seconds, kept_back = self._processes.broadcast(
            (progress.seconds + now - self._counted, self._validation_seconds)
        )
        self._counted, progress.seconds = now, seconds
        # The first iterations are slower than the rest. Until there are others, they are all that is known.
        self._paced = [*self._paced[:2], (progress.iteration, seconds)]
        (first, began), (last, ended) = self._paced[-2 if len(self._paced) == 3 else 0], self._paced[-1]
        if last == first:
            return None
        pace = (ended - began) / (last - first)
        left = max(int((self.hours * 3600 - seconds - kept_back) / max(pace, 1e-9)), 0)
        is_first = progress.last_iteration is None
        state.end_in(left)
        if not is_first or progress.last_iteration is None:
            return None
        return (
            f"--max-hours {self.hours:g}: at {pace:.3g} s an iteration the run ends after about "
            f"{progress.last_iteration:,} of {state.schedule_iterations:,} iterations; the learning rate drops "
            "as much sooner"
        )
