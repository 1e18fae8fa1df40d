"""Outlines of objects as flat arrays: COCO's polygons and run lengths, and the bitmaps that they stand for."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from data.coco.run_lengths import RunLengths, compressed

MIN_RING_NUMBERS = 6
"""Three points, MMDetection's rule; of fewer nothing is filled."""
MAX_RING_COORDINATE = 1e5
"""Pixels. pycocotools walks along each edge in steps of a fifth of a pixel, in 32 bits."""
HUNDREDTHS = 100.0
IS_RLE = -1
FAULTS = ("polygon-points", "polygon-numbers", "rle-unusable", "polygon-outside", "polygon-without-area", "no-outline")
"""Codes of the findings about outlines"""


class Bitmap(NamedTuple):
    """The part of a mask in which it can have ones: uint8 [h, w] of 0 and 1, and where it lies in the stored image."""

    left: int
    top: int
    bits: np.ndarray


@dataclass(frozen=True, eq=False)
class Segmentations:
    """The outlines of M annotations: polygons of one or more rings, run lengths, or none.

    All rings lie in one array, of which views of a file (training_view, a class list) share the memory: `starts` and
    `counts` alone belong to their annotations.
    """

    starts: np.ndarray
    """int64 [M]: the first ring of each annotation, or the number of its run lengths"""
    counts: np.ndarray
    """int32 [M]: its rings; 0 where it has no outline, IS_RLE where it has run lengths"""
    ring_offsets: np.ndarray
    """int64 [R + 1]: first number of each ring in `coordinates`"""
    coordinates: np.ndarray
    """x, y, x, y, ... in pixels of the stored image: int32 in hundredths where that holds every number exactly (as in
    COCO's files), else float64"""
    rle_text: np.ndarray
    """uint8: see RunLengths"""
    rle_offsets: np.ndarray
    """int64 [Q + 1]"""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def present(self) -> np.ndarray:
        """bool [M]: which annotations have an outline."""
        return self.counts != 0

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def take(self, rows: np.ndarray) -> Segmentations:
        """Those of the annotations that an index or bool array names, in its order."""
        return replace(self, starts=self.starts[rows], counts=self.counts[rows])

    @staticmethod
    def concatenate(parts: Sequence[Segmentations]) -> Segmentations:
        """All of them, in turn."""
        starts, num_rings, num_rles = [], 0, 0
        for part in parts:
            starts.append(part.starts + np.where(part.counts == IS_RLE, num_rles, num_rings))
            num_rings += len(part.ring_offsets) - 1
            num_rles += len(part.rle_offsets) - 1
        same = len({part.coordinates.dtype for part in parts}) == 1
        numbers = [
            part.coordinates if same or part.coordinates.dtype != np.int32 else part.coordinates / HUNDREDTHS
            for part in parts
        ]

        def joined(offsets: list[np.ndarray]) -> np.ndarray:
            ends = np.cumsum([0, *(each[-1] for each in offsets)])
            return np.concatenate([[0], *(each[1:] + start for each, start in zip(offsets, ends, strict=False))])

        return Segmentations(
            starts=np.concatenate(starts),
            counts=np.concatenate([part.counts for part in parts]),
            ring_offsets=joined([part.ring_offsets for part in parts]),
            coordinates=np.concatenate(numbers),
            rle_text=np.concatenate([part.rle_text for part in parts]),
            rle_offsets=joined([part.rle_offsets for part in parts]),
        )

    def rings(self, row: int) -> list[np.ndarray]:
        """The rings of an annotation: float64 [2 n] (x, y, x, y, ...) each, exactly as in the file."""
        start, count = int(self.starts[row]), max(int(self.counts[row]), 0)
        rings = []
        for ring in range(start, start + count):
            numbers = self.coordinates[self.ring_offsets[ring] : self.ring_offsets[ring + 1]]
            # A quotient of whole numbers is the double that is nearest to their decimal, which the file's parser gave.
            rings.append(numbers / HUNDREDTHS if numbers.dtype == np.int32 else numbers)
        return rings

    def compressed(self, row: int, height: int, width: int) -> bytes:
        """Its mask at the image's size as COCO's compressed run lengths; empty where it has no outline."""
        from pycocotools import mask

        if self.counts[row] == IS_RLE:
            return self._rle(row)
        rings = self.rings(row) or [np.zeros(MIN_RING_NUMBERS)]
        return mask.merge(mask.frPyObjects(rings, height, width))["counts"]

    def bitmap(self, row: int, height: int, width: int) -> Bitmap:
        """Its mask: pycocotools' (frPyObjects, merge, decode at the image's size), as MMDetection's poly2mask=True has
        it, cut to the bounds of the outline."""
        from pycocotools import mask

        rings = self.rings(row)
        if rings:
            # Pixels beyond the outline's lower right end are zeros: what lies before them needs no more room than this.
            right, bottom = (math.ceil(max(float(ring[axis::2].max()) for ring in rings)) + 1 for axis in (0, 1))
            width, height = min(max(right, 1), width), min(max(bottom, 1), height)
            entry = mask.merge(mask.frPyObjects(rings, height, width))
        elif self.counts[row]:
            entry = {"size": [height, width], "counts": self._rle(row)}
        else:
            return Bitmap(0, 0, np.zeros((0, 0), dtype=np.uint8))
        left, top, w, h = map(int, mask.toBbox(entry).tolist())
        return Bitmap(left, top, mask.decode(entry)[top : top + h, left : left + w])

    def _rle(self, row: int) -> bytes:
        start = self.starts[row]
        return self.rle_text[self.rle_offsets[start] : self.rle_offsets[start + 1]].tobytes()


def light(segmentation: Any) -> Any:
    """What a parser shall keep of an annotation's "segmentation": lists of numbers as arrays, a tenth of their
    memory."""
    if type(segmentation) is not list:
        return segmentation
    try:
        return [array("d", ring) if type(ring) is list else None for ring in segmentation]
    except (TypeError, OverflowError):  # a ring of something else than numbers
        return [_numbers(ring) for ring in segmentation]


def _numbers(ring: Any) -> Any:
    try:
        return array("d", ring) if type(ring) is list else None
    except (TypeError, OverflowError):
        return None


def pack(given: list[Any], widths: np.ndarray, heights: np.ndarray) -> tuple[Segmentations, dict[str, np.ndarray]]:
    """What `light` left of each annotation, packed, and what is wrong with it: bool [M] by the finding's code.

    widths, heights: int64 [M], of each annotation's image. Rings that nothing can be filled of are left out, as
    MMDetection leaves them out; rings outside of the image or without area stay, and fill nothing.
    """
    count = len(given)
    faults = {code: np.zeros(count, dtype=bool) for code in FAULTS[:3]}
    owners: list[int] = []
    rings: list[array[float]] = []
    rle_owners: list[int] = []
    texts: list[bytes] = []
    for row, segmentation in enumerate(given):
        if type(segmentation) is dict:
            text = compressed(segmentation, int(heights[row]), int(widths[row]))
            if text is None:
                faults["rle-unusable"][row] = True
            else:
                rle_owners.append(row)
                texts.append(text)
        elif type(segmentation) is list:
            for ring in segmentation:
                if ring is None:
                    faults["polygon-numbers"][row] = True
                elif len(ring) < MIN_RING_NUMBERS or len(ring) % 2:
                    faults["polygon-points"][row] = True
                else:
                    owners.append(row)
                    rings.append(ring)
    lengths = np.array([len(ring) for ring in rings], dtype=np.int64)
    coordinates = np.frombuffer(b"".join(ring.tobytes() for ring in rings), dtype=np.float64)
    owner = np.array(owners, dtype=np.int64)
    if len(rings):
        starts = np.cumsum(lengths) - lengths
        usable = np.logical_and.reduceat(np.abs(coordinates) <= MAX_RING_COORDINATE, starts)  # NaN is not
        faults["polygon-numbers"][owner[~usable]] = True
        coordinates = coordinates[np.repeat(usable, lengths)]
        lengths, owner = lengths[usable], owner[usable]
    faults |= _without_pixels(coordinates, lengths, owner, widths, heights)
    hundredths = np.rint(coordinates * HUNDREDTHS)
    if np.array_equal(hundredths / HUNDREDTHS, coordinates):
        coordinates = hundredths.astype(np.int32)
    counts = np.bincount(owner, minlength=count).astype(np.int32)
    firsts = np.cumsum(counts, dtype=np.int64) - counts
    firsts[rle_owners], counts[rle_owners] = np.arange(len(texts)), IS_RLE
    runs = RunLengths.of(texts, np.zeros((len(texts), 2)))
    ring_offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    packed = Segmentations(firsts, counts, ring_offsets, coordinates, runs.text, runs.offsets)
    return packed, faults | ({"no-outline": ~packed.present} if packed.present.any() else {})


def _without_pixels(
    coordinates: np.ndarray, lengths: np.ndarray, owner: np.ndarray, widths: np.ndarray, heights: np.ndarray
) -> dict[str, np.ndarray]:
    """Annotations with a ring outside of the image, or without area: bool [M] by the finding's code."""
    faults = {code: np.zeros(len(widths), dtype=bool) for code in FAULTS[3:5]}
    if not len(lengths):
        return faults
    starts = (np.cumsum(lengths) - lengths) // 2
    x, y = coordinates[::2], coordinates[1::2]
    outside = (np.maximum.reduceat(x, starts) <= 0) | (np.minimum.reduceat(x, starts) >= widths[owner])
    outside |= (np.maximum.reduceat(y, starts) <= 0) | (np.minimum.reduceat(y, starts) >= heights[owner])
    following = np.arange(1, len(x) + 1)
    following[np.cumsum(lengths) // 2 - 1] = starts
    # From the ring's own first point, so that far away from the corner nothing is lost to rounding.
    first_x, first_y = (np.repeat(values[starts], lengths // 2) for values in (x, y))
    dx, dy = x - first_x, y - first_y
    doubled = np.add.reduceat(dx * dy[following] - dx[following] * dy, starts)
    faults["polygon-outside"][owner[outside]] = True
    faults["polygon-without-area"][owner[(doubled == 0) & ~outside]] = True
    return faults
