"""One dict of a schedule, read key by key: every value checked, every unknown key an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from schedules.errors import ScheduleError, nearest
from schedules.literals import Origin, Path
from schedules.schedulers import NO_END

T = TypeVar("T")
Check = Callable[[Any], T]


class Unfit(Exception):
    """A value does not fit; the message says what is needed, the Section adds where."""


_REQUIRED: Any = object()


class Section:
    """A dict at `path`; take() its keys, then finish() to refuse what was not taken."""

    def __init__(self, values: Any, path: Path, origin: Origin) -> None:
        self.path = path
        self.origin = origin
        if not isinstance(values, dict):
            raise self.error(f"must be dict(...), not {values!r}")
        self.values = values
        self._known: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def error(self, message: str, key: str | None = None) -> ScheduleError:
        return self.origin.error(message, self.path if key is None else (*self.path, key))

    def take(self, key: str, check: Check[T], default: Any = _REQUIRED) -> T:
        """The checked value of `key`, or `default` as it is where the key is absent."""
        self._known.append(key)
        if key not in self.values:
            if default is _REQUIRED:
                raise self.error(f"has no {key}; add it")
            return default
        try:
            return check(self.values[key])
        except Unfit as unfit:
            raise self.error(f"{unfit}, not {_shown(self.values[key])}", key) from None

    def section(self, key: str, default: Any = _REQUIRED) -> Section:
        self._known.append(key)
        if key not in self.values and default is _REQUIRED:
            raise self.error(f"has no {key}; add it")
        return Section(self.values.get(key, default), (*self.path, key), self.origin)

    def finish(self) -> None:
        for key in self.values:
            if key == "_delete_":
                raise self.error("belongs to inheritance from other files, and a schedule is one flat file", key)
            if key not in self._known:
                raise self.error(f"unknown key{nearest(key, self._known)}", key)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # whole numbers too long to print
        text = "so long a number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(at_least: int, at_most: int = NO_END) -> Check[int]:
    def check(value: Any) -> int:
        if type(value) is not int or not at_least <= value <= at_most:
            limit = "" if at_most == NO_END and type(value) is int and value < at_least else f" and <= {at_most}"
            raise Unfit(f"must be a whole number >= {at_least}{limit}")
        return value

    return check


def number(above: float | None = None, at_least: float | None = None, at_most: float | None = None) -> Check[float]:
    """A finite number within the limits, as a float."""
    limits = [
        f"{sign} {limit:g}" for sign, limit in ((">", above), (">=", at_least), ("<=", at_most)) if limit is not None
    ]

    def check(value: Any) -> float:
        try:
            result = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            result = math.inf
        outside = (
            (above is not None and result <= above)
            or (at_least is not None and result < at_least)
            or (at_most is not None and result > at_most)
        )
        if not math.isfinite(result) or outside:
            raise Unfit(f"must be a finite number{' ' if limits else ''}{' and '.join(limits)}")
        return result

    return check


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unfit("must be True or False")
    return value


def choice(*allowed: Any, hint: str = "") -> Check[Any]:
    def check(value: Any) -> Any:
        for one in allowed:
            if type(value) is type(one) and value == one:
                return value
        near = nearest(value, allowed) if isinstance(value, str) and len(allowed) > 3 else ""
        near = near if near.startswith("; did") else ""
        raise Unfit(f"must be {' or '.join(map(repr, allowed))}{hint}{near}")

    return check


def optional(check: Check[T]) -> Check[T | None]:
    return lambda value: None if value is None else check(value)


def increasing(at_least: int) -> Check[tuple[int, ...]]:
    one = whole(at_least)

    def check(value: Any) -> tuple[int, ...]:
        message = f"must be a list of whole numbers >= {at_least}, each larger than the one before"
        if not isinstance(value, (list, tuple)):
            raise Unfit(message)
        try:
            numbers = tuple(one(item) for item in value)
        except Unfit:
            raise Unfit(message) from None
        if not _rises(numbers):
            raise Unfit(message)
        return numbers

    return check


def _rises(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in zip(numbers, numbers[1:], strict=False))


def pairs_of_whole(value: Any) -> tuple[tuple[int, int], ...]:
    """[(epoch, interval), ...] with rising epochs."""
    message = "must be a list of (epoch, interval) pairs of whole numbers >= 1, epochs rising"
    if not isinstance(value, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in value):
        raise Unfit(message)
    try:
        result = tuple((whole(1)(epoch), whole(1)(interval)) for epoch, interval in value)
    except Unfit:
        raise Unfit(message) from None
    if not _rises([epoch for epoch, _ in result]):
        raise Unfit(message)
    return result


def betas(value: Any) -> tuple[float, float]:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        first, second = (number(at_least=0)(item) for item in value)
        if first < 1 and second < 1:
            return first, second
    raise Unfit("must be two numbers >= 0 and < 1")
