"""The values of a configuration while it is read, and how many of them one reading may make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from schedules.errors import Place, ScheduleError

MAX_DEPTH = 50  # of brackets, and of dicts and lists inside each other; MMDetection's deepest configuration has 14
MAX_VALUES = 200_000  # evaluated, copied and joined in all; MMDetection's largest configuration takes 36,000

SCALARS = (str, bool, int, float, type(None))


class BaseDict(dict[Any, Any]):
    """A dict of a base file, which the file above can change as MMEngine lets it: keys are attributes too, update()
    reaches into inner dicts, pop() takes a missing key, and what is put in becomes such dicts and new lists.
    """

    # Names that stand for something else on MMEngine's dict, so that a key of that name is no attribute.
    NO_ATTRIBUTES = frozenset(
        [*dir(dict), "build_lazy", "deepcopy", "freeze", "unfreeze", "lazy", "merge", "scope", "to_dict", "_hook"]
    )


@dataclass(frozen=True)
class BaseReference:
    """{{_base_.a.b}}: the value that the base files have in the end, put in when the whole file is read."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Unread:
    """The value of a key that nobody asked for and that cannot be read. Whoever uses it gets the error."""

    error: ScheduleError


class Pass(list[Any]):
    """What enumerate() and a generator give: to be gone through, and no value of a configuration."""


@dataclass
class Budget:
    """How many values one reading may still evaluate, copy or join."""

    left: int = MAX_VALUES

    def spend(self, count: int, place: Place, line: int | None = None) -> None:
        if count > self.left:
            raise place.error(f"the file makes more than {MAX_VALUES:,} values, so it is no configuration", line)
        self.left -= count


def kind_of(value: Any) -> str:
    """A value's type, in words."""
    if isinstance(value, Pass):
        return "generator"
    return "dict" if isinstance(value, dict) else type(value).__name__
