"""What the text after an option must be: types for argparse, whose messages say it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Number(Generic[T]):
    """An argparse type. expected: the numbers it takes, in words. metavar: how --help writes one."""

    kind: type[T]
    fits: Callable[[T], bool]
    expected: str
    metavar: str

    def __call__(self, text: str) -> T:
        try:
            if self.fits(value := self.kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text} is not {self.expected}")


positive_int = Number(int, lambda value: value >= 1, "a whole number of at least 1", "N")
not_negative_int = Number(int, lambda value: value >= 0, "a whole number of at least 0", "N")
seed = Number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1", "N")
positive_float = Number(float, lambda value: 0 < value < math.inf, "a finite number above 0", "X")
fraction = Number(float, lambda value: 0 <= value <= 1, "from 0 to 1", "P")
inner_fraction = Number(float, lambda value: 0 < value < 1, "between 0 and 1", "P")
