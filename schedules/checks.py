"""What a value of a schedule must be. A check takes a value and its place, and returns it as the schedule holds
it, or raises ScheduleError with file, line and key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from schedules.errors import Place, nearest

T = TypeVar("T")

NO_END = 1_000_000_000  # MMEngine's "never ends"; also the largest whole number a schedule may hold

Check = Callable[[Any, Place], Any]
Keys = Mapping[str, Check | tuple[Check, Any]]  # (check, default); a check alone: the key must be there


def read_dict(value: Any, place: Place, keys: Keys) -> dict[str, Any]:
    """The checked value of every key; the default as it is where the key is absent. No other key may be there."""
    result = {}
    dictionary(value, place)
    for key, known in keys.items():
        check, *default = known if isinstance(known, tuple) else (known,)
        if key in value:
            result[key] = check(value[key], place.at(key))
        elif default:
            result[key] = default[0]
        else:
            raise place.error(f"has no {key}; add it")
    for key in value:
        if key == "_delete_":
            raise place.at(key).error("replaces what a base file says, and no base file has this key; take it away")
        if key not in keys:
            raise place.at(key).unknown(keys)
    return result


def read_typed(
    value: Any, place: Place, kinds: Mapping[str, Keys], default: str | None = None, hint: str = ""
) -> dict[str, Any]:
    """read_dict() with the keys of the kind that the dict's `type` names, `default` where it names none."""
    kind = dictionary(value, place).get("type", default)
    of_type = choice(*kinds, hint=hint)
    keys = kinds.get(kind, {}) if isinstance(kind, str) else {}
    return read_dict(value, place, {"type": (of_type, default) if default else of_type, **keys})


def checked_fields(kind: type[Any]) -> Keys:
    """The keys that a dataclass's fields with a check in their metadata stand for."""
    return {
        field.name: field.metadata["check"]
        if field.default is field.default_factory is MISSING
        else (field.metadata["check"], {} if field.default is MISSING else field.default)
        for field in fields(kind)
        if field.metadata
    }


def made(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass `kind` of those values that are its fields."""
    return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def dictionary(value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise place.unfit("must be dict(...)", value)
    return value


def whole(at_least: int, at_most: int = NO_END) -> Check:
    def check(value: Any, place: Place) -> int:
        if not _is_whole(value, at_least, at_most):
            limit = f" and <= {at_most}" if type(value) is not int or value > at_most else ""
            raise place.unfit(f"must be a whole number >= {at_least}{limit}", value)
        return value

    return check


def _is_whole(value: Any, at_least: int, at_most: int = NO_END) -> bool:
    return type(value) is int and at_least <= value <= at_most


def number(above: float | None = None, at_least: float | None = None, at_most: float | None = None) -> Check:
    """A finite number within the limits, as a float."""
    given = {">": above, ">=": at_least, "<=": at_most}
    limits = " and ".join(f"{sign} {limit:g}" for sign, limit in given.items() if limit is not None)

    def check(value: Any, place: Place) -> float:
        try:
            result = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            result = math.inf
        if (
            not math.isfinite(result)
            or (above is not None and result <= above)
            or (at_least is not None and result < at_least)
            or (at_most is not None and result > at_most)
        ):
            raise place.unfit(f"must be a finite number {limits}".rstrip(), value)
        return result

    return check


def flag(value: Any, place: Place) -> bool:
    if not isinstance(value, bool):
        raise place.unfit("must be True or False", value)
    return value


def choice(*allowed: Any, hint: str = "") -> Check:
    def check(value: Any, place: Place) -> Any:
        if any(type(value) is type(one) and value == one for one in allowed):
            return value
        near = nearest(value, map(str, allowed)) if isinstance(value, str) and len(allowed) > 3 else ""
        near = near if near.startswith("; did") else ""
        raise place.unfit(f"must be {' or '.join(map(repr, allowed))}{hint}{near}", value)

    return check


def optional(check: Check) -> Check:
    return lambda value, place: None if value is None else check(value, place)


def increasing(value: Any, place: Place) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(_is_whole(item, 0) for item in value) or not _rises(value):
        raise place.unfit("must be a list of whole numbers >= 0, each larger than the one before", value)
    return tuple(value)


def rising_pairs(value: Any, place: Place) -> tuple[tuple[int, int], ...]:
    """[(epoch, interval), ...] with rising epochs."""
    if (
        not isinstance(value, (list, tuple))
        or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
        or not all(_is_whole(item, 1) for pair in value for item in pair)
        or not _rises([epoch for epoch, _ in value])
    ):
        raise place.unfit("must be a list of (epoch, interval) pairs of whole numbers >= 1, epochs rising", value)
    return tuple((epoch, interval) for epoch, interval in value)


def _rises(numbers: Any) -> bool:
    return all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
