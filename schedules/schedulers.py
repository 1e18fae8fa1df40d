"""The kinds of learning-rate schedulers, and the curve that those of a run make together.

A scheduler counts finished iterations (by_epoch=False) or finished epochs (by_epoch=True). It acts while
begin <= count < end, so that its own step s runs from 0 at `begin` to end - begin - 1, and what it did last
stays. Step 0 is taken before the first iteration where begin is 0. The values are those of MMEngine 0.10.7,
whose schedulers multiply the current learning rate step by step; the closed forms here are the products of
those steps.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from schedules.checks import NO_END, increasing, number, optional, whole
from schedules.errors import ScheduleError

S = TypeVar("S", bound="Scheduler")


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What all kinds share. `begin` and `end` count epochs, or iterations where by_epoch is False.

    end None (only by iteration): the end of the run. Fractions of an epoch are possible with
    convert_to_iter_based, which turns a scheduler by epoch into one that moves at every iteration. A field's
    metadata has the check of its value, and "counts" where it counts epochs or iterations as well.
    In the methods, `lr` is the current learning rate, `base_lr` the optimizer's own before any scheduler.
    """

    begin: int | float = 0
    end: int | float | None = None
    by_epoch: bool = True
    convert_to_iter_based: bool = False

    @property
    def kind(self) -> str:
        return type(self).__name__

    def in_own_steps(self: S, max_epochs: int, iterations_per_epoch: int) -> S:
        """The same scheduler with a definite end, and counted in iterations where convert_to_iter_based asks
        for it.
        """
        length = iterations_per_epoch
        end = self.end
        if end is None:
            end = max_epochs if self.by_epoch else max_epochs * length
        if not self.convert_to_iter_based:
            return replace(self, end=end)
        return replace(
            self,
            begin=int(self.begin * length),
            end=end if end == NO_END else int(end * length),
            by_epoch=False,
            convert_to_iter_based=False,
            **{f.name: _times(getattr(self, f.name), length) for f in fields(self) if "counts" in f.metadata},
        )

    @property
    def span(self) -> int:
        """Number of steps it would take with all the time in the world: end - begin."""
        assert self.end is not None, "in_own_steps comes first"
        return int(self.end - self.begin)

    def floor(self, base_lr: float) -> float:
        """The learning rate that it leaves as it is: it multiplies what is above."""
        return 0.0

    def only_multiplies(self, last_step: int) -> bool:
        """Whether steps 0..last_step multiply the learning rate by numbers that do not depend on it."""
        return self.floor(1.0) == 0

    def multiple(self, step: int) -> float:
        """Product of what steps 0..step multiply the learning rate above the floor by."""
        raise NotImplementedError

    def advance(self, lr: float, base_lr: float, step: int) -> float:
        """The learning rate after steps 0..step, where it was `lr` before step 0 and nothing else changed it."""
        multiple, floor = self.multiple(step), self.floor(base_lr)
        return lr if multiple == 1 else floor + (lr - floor) * multiple

    def step_once(self, lr: float, base_lr: float, step: int) -> float:
        """The learning rate after `step` alone, where two schedulers move it in turns."""
        if step == 0:
            return self.advance(lr, base_lr, 0)
        floor, before = self.floor(base_lr), self.multiple(step - 1)
        return floor + (lr - floor) * (self.multiple(step) / before if before else 0.0)


@dataclass(frozen=True, kw_only=True)
class LinearLR(Scheduler):
    """The factor goes from start_factor at step 0 to end_factor at the last step, end - begin - 1."""

    # MMEngine divides by the factor before, so that only the end of the ramp may be 0.
    start_factor: float = field(default=1 / 3, metadata={"check": number(above=0, at_most=1)})
    end_factor: float = field(default=1.0, metadata={"check": number(at_least=0, at_most=1)})

    def multiple(self, step: int) -> float:
        if step == 0:
            return self.start_factor
        return self.start_factor + (self.end_factor - self.start_factor) * step / (self.span - 1)


@dataclass(frozen=True, kw_only=True)
class ConstantLR(Scheduler):
    """The factor holds from step 0 on and is taken back at the last step, end - begin - 1 (never where that
    is 0).
    """

    factor: float = field(default=1 / 3, metadata={"check": number(above=0, at_most=1)})

    def multiple(self, step: int) -> float:
        return 1.0 if 0 < step == self.span - 1 else self.factor


@dataclass(frozen=True, kw_only=True)
class MultiStepLR(Scheduler):
    """Multiplies by gamma at each milestone; milestones count from `begin`."""

    milestones: tuple[int, ...] = field(metadata={"check": increasing, "counts": True})
    gamma: float = field(default=0.1, metadata={"check": number(above=0)})

    def multiple(self, step: int) -> float:
        passed = 0
        for milestone in self.milestones:
            passed += milestone <= step
        return _power(self.gamma, passed)


@dataclass(frozen=True, kw_only=True)
class StepLR(Scheduler):
    """Multiplies by gamma every step_size steps."""

    step_size: int = field(metadata={"check": whole(1), "counts": True})
    gamma: float = field(default=0.1, metadata={"check": number(above=0)})

    def multiple(self, step: int) -> float:
        return _power(self.gamma, step // self.step_size)


@dataclass(frozen=True, kw_only=True)
class ExponentialLR(Scheduler):
    """Multiplies by gamma at every step but step 0."""

    gamma: float = field(metadata={"check": number(above=0)})

    def multiple(self, step: int) -> float:
        return _power(self.gamma, step)


@dataclass(frozen=True, kw_only=True)
class CosineAnnealingLR(Scheduler):
    """Half a cosine from the learning rate it finds down to the floor in T_max steps, and up again in the
    next T_max.

    The floor is eta_min (a learning rate) or eta_min_ratio times base_lr; T_max defaults to end - begin. One
    step after the bottom the rise starts anew from base_lr, whatever other schedulers have done: from then on
    the curve is no longer a multiple of the learning rate it found.
    """

    T_max: int | None = field(default=None, metadata={"check": optional(whole(1)), "counts": True})
    eta_min: float | None = field(default=None, metadata={"check": optional(number(at_least=0))})
    eta_min_ratio: float | None = field(default=None, metadata={"check": optional(number(at_least=0))})

    @property
    def half_period(self) -> int:
        return self.T_max or self.span

    def floor(self, base_lr: float) -> float:
        return base_lr * self.eta_min_ratio if self.eta_min_ratio is not None else self.eta_min or 0.0

    def only_multiplies(self, last_step: int) -> bool:
        return super().only_multiplies(last_step) and last_step <= self.half_period

    def multiple(self, step: int) -> float:
        # 1 + cos loses digits near the bottom; MMEngine loses the same ones, as its steps are ratios of this.
        return (1 + math.cos(math.pi * step / self.half_period)) / 2

    def _rise_from_bottom(self, base_lr: float) -> float:
        return (base_lr - self.floor(base_lr)) * (1 - math.cos(math.pi / self.half_period)) / 2

    def advance(self, lr: float, base_lr: float, step: int) -> float:
        half = self.half_period
        if step <= half:
            return super().advance(lr, base_lr, step)
        after_bottom = (step - half - 1) // (2 * half) * (2 * half) + half + 1
        rise = self.multiple(step) / self.multiple(after_bottom)
        return self.floor(base_lr) + self._rise_from_bottom(base_lr) * rise

    def step_once(self, lr: float, base_lr: float, step: int) -> float:
        if step > 0 and (step - 1 - self.half_period) % (2 * self.half_period) == 0:
            return lr + self._rise_from_bottom(base_lr)
        return super().step_once(lr, base_lr, step)


@dataclass(frozen=True, kw_only=True)
class PolyLR(Scheduler):
    """(1 - step / last step) ** power of the way above the floor eta_min (a learning rate)."""

    power: float = field(default=1.0, metadata={"check": number(above=0)})
    eta_min: float = field(default=0.0, metadata={"check": number(at_least=0)})

    def floor(self, base_lr: float) -> float:
        return self.eta_min

    def multiple(self, step: int) -> float:
        last = self.span - 1
        return ((last - step) / last) ** self.power if step else 1.0


def _times(counts: Any, length: int) -> Any:
    """Epochs, or a tuple of them, in iterations."""
    return tuple(count * length for count in counts) if isinstance(counts, tuple) else counts and counts * length


def _power(factor: float, exponent: int) -> float:
    try:
        return factor**exponent
    except OverflowError:
        return math.inf


_HIGHEST = 1e6  # no training survives this; far above it, floats overflow
_MOST_REPLAYED = 50_000_000  # 400 MB of learning rates, some minutes

KINDS: dict[str, type[Scheduler]] = {
    kind.__name__: kind
    for kind in (LinearLR, MultiStepLR, ConstantLR, StepLR, ExponentialLR, CosineAnnealingLR, PolyLR)
}


class LearningRateCurve:
    """curve(iteration) -> learning rate of optimizer step `iteration` (0-based).

    At step i the schedulers by iteration have counted i finished iterations and those by epoch
    i // iterations_per_epoch finished epochs; each acts on the learning rate that the others left. After the
    run's end the learning rate stays.

    Schedulers that only multiply commute: the learning rate is base_lr times their multiples. One with a
    floor (eta_min) or a restart is applied in its turn, in closed form again, where no other acts meanwhile.
    Where another one does (a cosine to eta_min below a warmup by iteration) no closed form exists; then the
    steps are replayed once, in MMEngine's order, and kept.

    Equal to MMEngine 0.10.7's schedulers under its Runner to about 1e-14 relative. Raises ScheduleError where
    a scheduler ends before it begins once epochs are turned into iterations.
    """

    def __init__(
        self, schedulers: Sequence[Scheduler], base_lr: float, max_epochs: int, iterations_per_epoch: int
    ) -> None:
        self.base_lr = base_lr
        self._last_iteration = max_epochs * iterations_per_epoch - 1
        own = [s.in_own_steps(max_epochs, iterations_per_epoch) for s in schedulers]
        for place, s in enumerate(own):
            if s.span < 1:
                raise ScheduleError(
                    f"param_scheduler.{place} ({s.kind}) begins at {s.begin} and ends at "
                    f"{s.end} with {iterations_per_epoch} iterations per epoch; end must be larger"
                )
        periods = [iterations_per_epoch if s.by_epoch else 1 for s in own]  # iterations per count
        last_steps = [
            min(self._last_iteration // period - int(s.begin), s.span - 1)
            for s, period in zip(own, periods, strict=True)
        ]
        in_file_order = [entry for entry in zip(own, periods, last_steps, strict=True) if entry[2] >= 0]
        self._acting = sorted(in_file_order, key=lambda entry: (entry[0].begin * entry[1], entry[0].by_epoch))
        self._replayed = None
        if not self._has_closed_form():
            if self._last_iteration >= _MOST_REPLAYED:
                raise ScheduleError(
                    f"schedulers that overlap are computed step by step, for at most {_MOST_REPLAYED:,} iterations, "
                    f"and the run has {self._last_iteration + 1:,}: give fewer epochs, or schedulers that follow "
                    "each other"
                )
            self._replayed = self._replay(in_file_order)
        for iteration in {0, self._last_iteration, *(int(s.begin) * p + end * p for s, p, end in self._acting)}:
            if not self(iteration) <= _HIGHEST:
                raise ScheduleError(
                    f"the learning rate is {self(iteration):g} in iteration {iteration:,}: give a smaller lr, or a "
                    f"gamma not above 1 (at most {_HIGHEST:g} is possible)"
                )

    def __call__(self, iteration: int) -> float:
        iteration = min(iteration, self._last_iteration)
        if self._replayed is not None:
            return self._replayed[iteration]
        lr = self.base_lr
        for scheduler, period, last_step in self._acting:
            step = iteration // period - int(scheduler.begin)
            if step >= 0:
                lr = scheduler.advance(lr, self.base_lr, min(step, last_step))
        return lr

    def _has_closed_form(self) -> bool:
        spans = [
            (int(s.begin) * period, (int(s.begin) + last) * period, s.only_multiplies(last))
            for s, period, last in self._acting
        ]
        return all((a[2] and b[2]) or a[1] < b[0] for place, a in enumerate(spans) for b in spans[place + 1 :])

    def _replay(self, in_file_order: list[tuple[Scheduler, int, int]]) -> array[float]:
        values = array("d")
        lr = self.base_lr
        # Before the first iteration all step in the file's order, later those by epoch after the others.
        iterations_first = sorted(in_file_order, key=lambda entry: entry[0].by_epoch)
        for iteration in range(self._last_iteration + 1):
            for scheduler, period, last_step in iterations_first if iteration else in_file_order:
                step = iteration // period - int(scheduler.begin)
                if iteration % period == 0 and 0 <= step <= last_step:
                    lr = scheduler.step_once(lr, self.base_lr, step)
            values.append(lr)
        return values
