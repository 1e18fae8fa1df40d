"""What the text after an option must be: numbers of a range, which argparse's messages, --help and the docs name, and
names of files."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T", int, float)

NO_LIMIT = 1_000_000_000  # no count of anything here is larger


@dataclass(frozen=True)
class Number(Generic[T]):
    """An argparse type: finite numbers of a range. low, high: its ends. excluded: those ends that do not belong to it.
    metavar: how --help writes one."""

    kind: type[T]
    low: T
    high: T
    excluded: tuple[T, ...] = ()
    metavar: str = "N"

    @property
    def range(self) -> str:
        """The range in words."""
        low, high = (f"{end:g}" if isinstance(end, float) else str(end) for end in (self.low, self.high))
        if self.high in self.excluded:
            return f"between {low} and {high}"
        return f"above {low}, at most {high}" if self.excluded else f"from {low} to {high}"

    def __call__(self, text: str) -> T:
        try:
            value = self.kind(text)
            if self.low <= value <= self.high and value not in self.excluded:
                return value
        except ValueError:
            pass
        kind = "a whole number" if self.kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text[:40]} is not {kind} {self.range}")


def whole(low: int, high: int = NO_LIMIT) -> Number[int]:
    """Whole numbers from low to high."""
    return Number(int, low, high)


def above_0(high: float) -> Number[float]:
    """Numbers above 0 and at most `high`."""
    return Number(float, 0.0, high, excluded=(0.0,), metavar="X")


AUTO_BATCH_SIZE = 0
"""--batch-size auto, until the number is found."""


class BatchSize(Number[int]):
    """A number of images, or auto."""

    def __call__(self, text: str) -> int:
        return AUTO_BATCH_SIZE if text == "auto" else super().__call__(text)


positive_int = whole(1)
batch_size = BatchSize(int, 1, 4096, metavar="N|auto")
side = whole(33, 16384)
"""A side of an image at the network's scale, pixels. Above 32 the coarsest normalized map has two cells or more, which
batch norm and group norm need."""
fraction = Number(float, 0.0, 1.0, metavar="P")
inner_fraction = Number(float, 0.0, 1.0, excluded=(0.0, 1.0), metavar="P")


def name_pair(text: str) -> str:
    """An argparse type: two names, OLD=NEW."""
    old, _, new = text.partition("=")
    if not old.strip() or not new.strip():
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no pair of names: write OLD=NEW")
    return f"{old.strip()}={new.strip()}"


def share(text: str) -> str:
    """An argparse type: a name and its weight, NAME=WEIGHT."""
    name, _, weight = text.rpartition("=")
    try:
        if name.strip() and 0 <= float(weight) < NO_LIMIT:
            return f"{name.strip()}={float(weight):g}"
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is no share: write NAME=WEIGHT, with a number from 0")


class NameList(argparse.Action):
    """Different names, with commas or blanks between them, as one tuple."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        names = tuple(name.strip() for value in values for name in value.split(","))
        if not all(names) or len(set(names)) < len(names):
            raise argparse.ArgumentError(self, f"{' '.join(values)[:40]} is no list of different names: write A,B,C")
        setattr(namespace, self.dest, names)


def png_file(text: str) -> Path:
    """An argparse type: where a PNG image shall go."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png: an image is written as PNG")
    return Path(text)
