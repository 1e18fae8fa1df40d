"""The kinds of learning-rate schedulers, each as a closed form of the number of steps it has taken.

A scheduler counts finished iterations (by_epoch=False) or finished epochs (by_epoch=True). It acts while
begin <= count < end, so that its own step s runs from 0 at `begin` to end - begin - 1, and what it did last
stays. Step 0 is taken before the first iteration where begin is 0. The values are those of MMEngine 0.10.7,
whose schedulers multiply the current learning rate step by step; the closed forms here are the products of
those steps.

Every kind has two faces:

    advance(lr, base_lr, step)     the learning rate after steps 0..step, where it was `lr` before step 0 and
                                   nothing else changed it in between
    step_once(lr, base_lr, step)   the learning rate after `step` alone, where two schedulers move it in turns
                                   (see learning_rate.py)

`base_lr` is the optimizer's own learning rate, before any scheduler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

NO_END = 1_000_000_000  # MMEngine's "never ends"; also the largest whole number a schedule may hold

S = TypeVar("S", bound="Scheduler")


def _power(factor: float, exponent: float) -> float:
    try:
        return factor**exponent
    except OverflowError:
        return math.inf


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What all kinds share. `begin` and `end` count epochs, or iterations where by_epoch is False.

    end None (only by iteration): the end of the run. Fractions of an epoch are possible with
    convert_to_iter_based, which turns a scheduler by epoch into one that moves at every iteration.
    """

    kind: ClassVar[str]

    begin: int | float = 0
    end: int | float | None = None
    by_epoch: bool = True
    convert_to_iter_based: bool = False

    def in_own_steps(self: S, max_epochs: int, iterations_per_epoch: int) -> S:
        """The same scheduler with a definite end, and counted in iterations where convert_to_iter_based asks
        for it.
        """
        if self.convert_to_iter_based:
            return self._in_iterations(max_epochs, iterations_per_epoch)
        if self.end is None:
            return replace(self, end=max_epochs if self.by_epoch else max_epochs * iterations_per_epoch)
        return self

    def _in_iterations(self: S, max_epochs: int, length: int) -> S:
        end = max_epochs if self.end is None else self.end
        return replace(
            self,
            begin=int(self.begin * length),
            end=NO_END if end == NO_END else int(end * length),
            by_epoch=False,
            convert_to_iter_based=False,
        )

    @property
    def span(self) -> int:
        """Number of steps it would take with all the time in the world: end - begin."""
        assert self.end is not None, "in_own_steps comes first"
        return int(self.end - self.begin)

    def first_move(self) -> int:
        """The first step that changes the learning rate."""
        return 1

    def only_multiplies(self, last_step: int) -> bool:
        """Whether steps 0..last_step multiply the learning rate by numbers that do not depend on it."""
        return True

    def multiple(self, step: int) -> float:
        """Product of what steps 0..step multiply by, for a scheduler that only multiplies."""
        raise NotImplementedError

    def advance(self, lr: float, base_lr: float, step: int) -> float:
        return lr * self.multiple(step)

    def step_once(self, lr: float, base_lr: float, step: int) -> float:
        if step == 0:
            return lr * self.multiple(0)
        before = self.multiple(step - 1)
        return lr * (self.multiple(step) / before) if before else 0.0


@dataclass(frozen=True, kw_only=True)
class LinearLR(Scheduler):
    """The factor goes from start_factor at step 0 to end_factor at the last step, end - begin - 1."""

    kind: ClassVar[str] = "LinearLR"

    start_factor: float = 1 / 3
    end_factor: float = 1.0

    def first_move(self) -> int:
        return 0

    def multiple(self, step: int) -> float:
        last = self.span - 1
        if step == 0:
            return self.start_factor
        return self.start_factor + (self.end_factor - self.start_factor) * step / last


@dataclass(frozen=True, kw_only=True)
class ConstantLR(Scheduler):
    """The factor holds from step 0 on and is taken back at the last step, end - begin - 1 (never where that
    is 0).
    """

    kind: ClassVar[str] = "ConstantLR"

    factor: float = 1 / 3

    def first_move(self) -> int:
        return 0

    def multiple(self, step: int) -> float:
        return 1.0 if 0 < step == self.span - 1 else self.factor


@dataclass(frozen=True, kw_only=True)
class MultiStepLR(Scheduler):
    """Multiplies by gamma at each milestone; milestones count from `begin`."""

    kind: ClassVar[str] = "MultiStepLR"

    milestones: tuple[int, ...]
    gamma: float = 0.1

    def _in_iterations(self, max_epochs: int, length: int) -> MultiStepLR:
        converted = super()._in_iterations(max_epochs, length)
        return replace(converted, milestones=tuple(m * length for m in self.milestones))

    def first_move(self) -> int:
        return self.milestones[0] if self.milestones else self.span

    def multiple(self, step: int) -> float:
        passed = 0
        for milestone in self.milestones:
            if milestone > step:
                break
            passed += 1
        return _power(self.gamma, passed)


@dataclass(frozen=True, kw_only=True)
class StepLR(Scheduler):
    """Multiplies by gamma every step_size steps."""

    kind: ClassVar[str] = "StepLR"

    step_size: int
    gamma: float = 0.1

    def _in_iterations(self, max_epochs: int, length: int) -> StepLR:
        return replace(super()._in_iterations(max_epochs, length), step_size=self.step_size * length)

    def first_move(self) -> int:
        return self.step_size

    def multiple(self, step: int) -> float:
        return _power(self.gamma, step // self.step_size)


@dataclass(frozen=True, kw_only=True)
class ExponentialLR(Scheduler):
    """Multiplies by gamma at every step but step 0."""

    kind: ClassVar[str] = "ExponentialLR"

    gamma: float

    def multiple(self, step: int) -> float:
        return _power(self.gamma, step)

    def step_once(self, lr: float, base_lr: float, step: int) -> float:
        return lr * self.gamma if step else lr


@dataclass(frozen=True, kw_only=True)
class CosineAnnealingLR(Scheduler):
    """Half a cosine from the learning rate it finds down to the floor in T_max steps, and up again in the
    next T_max.

    The floor is eta_min (a learning rate) or eta_min_ratio times base_lr; T_max defaults to end - begin. One
    step after the bottom the rise starts anew from base_lr, whatever other schedulers have done: from then on
    the curve is no longer a multiple of the learning rate it found.
    """

    kind: ClassVar[str] = "CosineAnnealingLR"

    T_max: int | None = None
    eta_min: float | None = None
    eta_min_ratio: float | None = None

    def _in_iterations(self, max_epochs: int, length: int) -> CosineAnnealingLR:
        converted = super()._in_iterations(max_epochs, length)
        return replace(converted, T_max=None if self.T_max is None else self.T_max * length)

    @property
    def half_period(self) -> int:
        return self.T_max or self.span

    def floor(self, base_lr: float) -> float:
        if self.eta_min_ratio is not None:
            return base_lr * self.eta_min_ratio
        return self.eta_min or 0.0

    def only_multiplies(self, last_step: int) -> bool:
        return not self.eta_min and not self.eta_min_ratio and last_step <= self.half_period

    def _height(self, step: int) -> float:
        # 1 + cos loses digits near the bottom; MMEngine loses the same ones, as its steps are ratios of this.
        return 1 + math.cos(math.pi * step / self.half_period)

    def _rise_from_bottom(self, base_lr: float) -> float:
        return (base_lr - self.floor(base_lr)) * (1 - math.cos(math.pi / self.half_period)) / 2

    def advance(self, lr: float, base_lr: float, step: int) -> float:
        if step == 0:
            return lr
        half, floor = self.half_period, self.floor(base_lr)
        if step <= half:
            return floor + (lr - floor) * self._height(step) / 2
        after_bottom = (step - half - 1) // (2 * half) * (2 * half) + half + 1
        above = self._rise_from_bottom(base_lr)
        return floor + above * (self._height(step) / self._height(after_bottom))

    def step_once(self, lr: float, base_lr: float, step: int) -> float:
        if step == 0:
            return lr
        half, floor = self.half_period, self.floor(base_lr)
        if (step - 1 - half) % (2 * half) == 0:
            return lr + self._rise_from_bottom(base_lr)
        return floor + (lr - floor) * (self._height(step) / self._height(step - 1))


@dataclass(frozen=True, kw_only=True)
class PolyLR(Scheduler):
    """(1 - step / last step) ** power of the way above the floor eta_min (a learning rate)."""

    kind: ClassVar[str] = "PolyLR"

    power: float = 1.0
    eta_min: float = 0.0

    def only_multiplies(self, last_step: int) -> bool:
        return self.eta_min == 0

    def multiple(self, step: int) -> float:
        last = self.span - 1
        return ((last - step) / last) ** self.power if step else 1.0

    def advance(self, lr: float, base_lr: float, step: int) -> float:
        return self.eta_min + (lr - self.eta_min) * self.multiple(step) if step else lr

    def step_once(self, lr: float, base_lr: float, step: int) -> float:
        if step == 0:
            return lr
        left = self.span - step  # what was left to go before this step
        return self.eta_min + (lr - self.eta_min) * (1 - 1 / left) ** self.power


KINDS: dict[str, type[Scheduler]] = {
    kind.kind: kind for kind in (LinearLR, MultiStepLR, ConstantLR, StepLR, ExponentialLR, CosineAnnealingLR, PolyLR)
}
