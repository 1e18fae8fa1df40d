"""What the text after an option must be: types for argparse, whose messages say it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def positive_int(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 1, "a whole number of at least 1"))


def not_negative_int(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 0, "a whole number of at least 0"))


def seed(text: str) -> int:
    return int(_number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1"))


def positive_float(text: str) -> float:
    return _number(text, float, lambda value: value > 0 and math.isfinite(value), "a finite number above 0")


def fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "from 0 to 1")


def inner_fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < 1, "between 0 and 1")


def _number(text: str, kind: Callable[[str], float], fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")
    return value
