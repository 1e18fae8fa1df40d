"""Masks as COCO's compressed run lengths, any number of them in flat arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_FIRST_CHARACTER = 48
"""COCO writes numbers in 6-bit digits, as characters from this one on: five bits, and whether another one follows."""

_AT_ONCE = 60
"""pycocotools puts the number of masks, or four times that, into a byte, which numpy 2 refuses beyond 255."""


@dataclass(frozen=True, eq=False)
class RunLengths:
    """n masks, each in COCO's compressed run lengths (column by column, beginning with zeros)."""

    text: np.ndarray
    """uint8 [bytes]: the characters of all masks, one mask after another"""
    offsets: np.ndarray
    """int64 [n + 1]: first character of each mask"""
    sizes: np.ndarray
    """int64 [n, 2]: height and width of the mask's image, pixels"""

    def __len__(self) -> int:
        return len(self.sizes)

    @staticmethod
    def of(counts: Sequence[bytes], sizes: Sequence[Sequence[int]] | np.ndarray) -> RunLengths:
        """Those of compressed run lengths, one text a mask, with the (height, width) of each."""
        lengths = np.array([0, *map(len, counts)], dtype=np.int64)
        text = np.frombuffer(b"".join(counts), dtype=np.uint8)
        return RunLengths(text, np.cumsum(lengths), np.array(sizes, dtype=np.int64).reshape(-1, 2))

    @staticmethod
    def encode(bitmaps: np.ndarray) -> RunLengths:
        """Those of bitmaps, uint8 [n, height, width] of 0 and 1; fastest where a column's pixels lie together."""
        from pycocotools import mask

        encoded = mask.encode(np.asfortranarray(bitmaps.transpose(1, 2, 0))) if len(bitmaps) else []
        return RunLengths.of([entry["counts"] for entry in encoded], [bitmaps.shape[1:]] * len(bitmaps))

    @staticmethod
    def concatenate(parts: Iterable[RunLengths]) -> RunLengths:
        """The masks of all parts, one part after the other."""
        parts = list(parts) or [RunLengths.of([], [])]
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return RunLengths(
            np.concatenate([part.text for part in parts]),
            np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
            np.concatenate([part.sizes for part in parts]),
        )

    def take(self, rows: np.ndarray) -> RunLengths:
        """The masks that an index or bool array [n] names."""
        rows = np.arange(len(self))[rows]
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return RunLengths(self.text[places], offsets, self.sizes[rows])

    def counts(self, index: int) -> bytes:
        """The compressed run lengths of one mask."""
        return self.text[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def entries(self) -> list[dict[str, Any]]:
        """The masks as pycocotools takes them: {"size": [height, width], "counts": bytes} each."""
        return [{"size": size, "counts": self.counts(index)} for index, size in enumerate(self.sizes.tolist())]

    def decode(self, index: int) -> np.ndarray:
        """One mask as a bitmap, uint8 [height, width] of 0 and 1."""
        from pycocotools import mask

        return mask.decode({"size": self.sizes[index].tolist(), "counts": self.counts(index)})

    def areas(self) -> np.ndarray:
        """float64 [n]: the pixels of each mask."""
        from pycocotools import mask

        return self._each(mask.area).reshape(-1)

    def boxes_xywh(self) -> np.ndarray:
        """float64 [n, 4]: the box round each mask, pixels."""
        from pycocotools import mask

        return self._each(mask.toBbox).reshape(-1, 4)

    def _each(self, function: Callable[[list[dict[str, Any]]], Any]) -> np.ndarray:
        """What pycocotools' function gives of the masks, float64."""
        entries = self.entries()
        parts = [entries[start : start + _AT_ONCE] for start in range(0, len(entries), _AT_ONCE)]
        return np.concatenate([np.zeros(0), *(np.asarray(function(part), np.float64).reshape(-1) for part in parts)])


def of_box(box_xywh: Sequence[float], height: int, width: int) -> bytes:
    """The compressed run lengths of a box in an image."""
    from pycocotools import mask

    return mask.frPyObjects(np.array([box_xywh], dtype=np.float64), height, width)[0]["counts"]


def compressed(segmentation: Any, height: int, width: int) -> bytes | None:
    """The compressed run lengths of a mask of an image, given as COCO gives it: {"size": [height, width], "counts":
    run lengths or their compressed text}. None where that is not what is given, or the runs do not fill the image.
    """
    from pycocotools import mask

    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return None
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        if not all(type(count) is int and 0 <= count <= height * width for count in counts):
            return None
        if sum(counts) != height * width or height * width >= 2**32:
            return None
        return mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError:
            return None
    return counts if isinstance(counts, bytes) and _sum_of_runs(counts) == height * width else None


def _sum_of_runs(text: bytes) -> int | None:
    """The pixels that a compressed text describes; None for a text that is none. pycocotools does not check it."""
    digits = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - _FIRST_CHARACTER
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return None
    ends = np.flatnonzero(digits & 32 == 0) + 1
    starts = np.concatenate([[0], ends[:-1]])
    places = np.arange(len(digits)) - np.repeat(starts, ends - starts)
    if places.max() > 6:  # beyond the 32 bits of a run
        return None
    numbers = np.add.reduceat((digits & 31) << (5 * places), starts)
    numbers -= (digits[ends - 1] >> 4 & 1) << (5 * (ends - starts))  # the highest bit is the sign
    # From the fourth on, a number is the difference from the one two before.
    runs = numbers.copy()
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    return int(runs.sum()) if (runs >= 0).all() else None
