"""The learning rate of a run as a pure function of the iteration.

At optimizer step i (0-based) the schedulers by iteration have counted i finished iterations and those by
epoch i // iterations_per_epoch finished epochs; each acts on the learning rate that the others left.

Schedulers that only multiply commute, so that the learning rate is base_lr times the product of their
factors. One with a floor (eta_min) or a restart does not commute with others, but where the others have come
to rest before its first move, or start after its last, it is applied in its turn, in closed form again. Only
where such a scheduler and another one move the learning rate in turns (a cosine to eta_min below a warmup by
iteration) does no closed form exist; then the steps are replayed once, in MMEngine's order, and kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from schedules.errors import ScheduleError
from schedules.schedulers import Scheduler


class _Actor(NamedTuple):
    """A scheduler inside one run. Moments are sortable: (iteration, epoch schedulers last, place in the
    file).
    """

    scheduler: Scheduler
    place: int
    period: int  # iterations per count of this scheduler
    last_step: int  # the last step it takes within the horizon
    first_moment: tuple[int, int, int]
    last_moment: tuple[int, int, int]


class LearningRateCurve:
    """curve(iteration) -> learning rate, for iterations 0..horizon-1 (the run's, unless a longer horizon is
    given).

    Equal to MMEngine 0.10.7's schedulers under its Runner to about 1e-14 relative. Raises ScheduleError where
    a scheduler ends before it begins once epochs are turned into iterations.
    """

    def __init__(
        self,
        schedulers: Sequence[Scheduler],
        base_lr: float,
        max_epochs: int,
        iterations_per_epoch: int,
        horizon: int = 0,
    ) -> None:
        self.base_lr = base_lr
        self.horizon = max(horizon, max_epochs * iterations_per_epoch)
        self._iterations_per_epoch = iterations_per_epoch
        own = [s.in_own_steps(max_epochs, iterations_per_epoch) for s in schedulers]
        for place, scheduler in enumerate(own):
            if scheduler.span < 1:
                raise ScheduleError(
                    f"param_scheduler.{place} ({scheduler.kind}) begins at {scheduler.begin} and ends at "
                    f"{scheduler.end} with {iterations_per_epoch} iterations per epoch; end must be larger"
                )
        actors = [self._actor(scheduler, place) for place, scheduler in enumerate(own)]
        self._actors = sorted((a for a in actors if a is not None), key=lambda a: a.first_moment)
        self._replayed = None if self._has_closed_form() else self._replay()

    def __call__(self, iteration: int) -> float:
        if self._replayed is not None:
            return self._replayed[iteration]
        lr = self.base_lr
        for scheduler, _, period, last_step, _, _ in self._actors:
            step = (iteration if period == 1 else iteration // period) - scheduler.begin
            if step >= 0:
                lr = scheduler.advance(lr, self.base_lr, int(step if step < last_step else last_step))
        return lr

    def _actor(self, scheduler: Scheduler, place: int) -> _Actor | None:
        period = self._iterations_per_epoch if scheduler.by_epoch else 1
        last_step = min((self.horizon - 1) // period - int(scheduler.begin), scheduler.span - 1)
        if last_step < scheduler.first_move():
            return None

        def moment(step: int) -> tuple[int, int, int]:
            iteration = (int(scheduler.begin) + step) * period
            # Before the first iteration all step in the file's order, later those by epoch after the others.
            return iteration, int(scheduler.by_epoch and iteration > 0), place

        return _Actor(scheduler, place, period, last_step, moment(scheduler.first_move()), moment(last_step))

    def _has_closed_form(self) -> bool:
        for actor in self._actors:
            if actor.scheduler.only_multiplies(actor.last_step):
                continue
            for other in self._actors:
                apart = other.last_moment < actor.first_moment or actor.last_moment < other.first_moment
                if other is not actor and not apart:
                    return False
        return True

    def _replay(self) -> array[float]:
        values = array("d")
        lr = self.base_lr
        in_file_order = sorted(self._actors, key=lambda a: a.place)
        iterations_first = sorted(in_file_order, key=lambda a: a.scheduler.by_epoch)
        for iteration in range(self.horizon):
            for scheduler, _, period, last_step, _, _ in iterations_first if iteration else in_file_order:
                if iteration % period == 0:
                    step = iteration // period - int(scheduler.begin)
                    if 0 <= step <= last_step:
                        lr = scheduler.step_once(lr, self.base_lr, step)
            values.append(lr)
        return values
