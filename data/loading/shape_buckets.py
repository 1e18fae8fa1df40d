"""A few padded sizes for all batches of a training, so that what is compiled for one size serves many batches."""

from collections.abc import Sequence

import numpy as np

from data.transforms.geometry import PADDING_MULTIPLE

LONG_SIDES = 4
"""Long sides between a square and the longest image. At 800 by 1333 they are 960, 1088, 1216 and 1344, which the two
commonest shapes of COCO, 4:3 and 3:2, fill to 98 %."""


def shape_buckets(min_size: int, max_size: int) -> list[tuple[int, int]]:
    """(height, width) of the padded sizes for images resized to min_size and max_size, the smallest first.

    One short side with LONG_SIDES long ones, lying and standing, and a square for batches that hold both.
    """
    short = _rounded_up(min_size)
    steps = np.linspace(min_size, max_size, LONG_SIDES + 1)[1:]
    longs = sorted({_rounded_up(side) for side in steps.tolist()})
    buckets = {(short, long) for long in longs} | {(long, short) for long in longs} | {(longs[-1], longs[-1])}
    return sorted(buckets, key=lambda size: (size[0] * size[1], size))


def bucket_of(padded_size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The smallest bucket that holds a batch of `padded_size` (height, width); where none does, the size itself."""
    height, width = padded_size
    return next((bucket for bucket in buckets if bucket[0] >= height and bucket[1] >= width), padded_size)


def _rounded_up(side: float) -> int:
    return int(-(-side // PADDING_MULTIPLE) * PADDING_MULTIPLE)
