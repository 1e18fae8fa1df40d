"""Copy-paste (Ghiasi et al. 2021, "Simple copy-paste is a strong data augmentation method for instance segmentation"):
objects of another image, with exactly the pixels of their masks, on top of an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.transforms.geometry import MIN_CROPPED_BOX_SIDE, mask_bounds
from data.transforms.hash_rng import PASTE_STREAM, hash_uniform, hash_words


@dataclass
class MaskedObjects:
    """The objects of an image with their masks, in pixels of the batch.

    boxes_xyxy: float32 [n, 4]. labels: int64 [n]. rectangles: x, y, width and height of the part of each mask that bits
    has, uint8 [height, width] of 0 and 1.
    """

    boxes_xyxy: np.ndarray
    labels: np.ndarray
    rectangles: list[tuple[int, int, int, int]]
    bits: list[np.ndarray]

    def take(self, rows: np.ndarray) -> MaskedObjects:
        """Those that an index array names."""
        places = rows.tolist()
        return MaskedObjects(
            self.boxes_xyxy[rows],
            self.labels[rows],
            [self.rectangles[place] for place in places],
            [self.bits[place] for place in places],
        )


def paste_seed(seed: int) -> int:
    """The seed of everything that is drawn for the image that objects are taken from: its geometry and colors."""
    return int(hash_words(seed, PASTE_STREAM))


def partners(seed: int, epoch: int, words: np.ndarray, num_images: int) -> np.ndarray:
    """The image that each image (words int64 [N]) takes objects from: int64 [N], of all images alike."""
    return (hash_uniform(seed, PASTE_STREAM, epoch, words) * num_images).astype(np.int64)


def chosen_objects(key: int, valid: np.ndarray) -> np.ndarray:
    """Which objects (bool [G]: there is one) are pasted: int64 [n] places. The chance of each is drawn for the image,
    so that any number of them is as likely. key: of the image, int64."""
    draws = hash_uniform(PASTE_STREAM, np.array(key), np.arange(len(valid) + 1))
    return np.flatnonzero(valid & (draws[1:] < draws[0]))


def paste(own: MaskedObjects, others: MaskedObjects, size: tuple[int, int]) -> tuple[MaskedObjects, int]:
    """The objects of an image of `size` (height, width) under those of another; and how many are its own, the first.

    What lies outside of the image is cut off the others. Own objects lose the pixels that are hidden. A side of a box
    moves to where the mask now ends, if that is not where it ended before. Without a pixel left an object is gone;
    one whose mask had no pixel stays.
    """
    others = _cut(others, size)
    hidden = np.zeros(size, dtype=bool)
    for (x, y, width, height), bits in zip(others.rectangles, others.bits, strict=True):
        hidden[y : y + height, x : x + width] |= bits > 0
    boxes, kept = own.boxes_xyxy.copy(), []
    rectangles, all_bits = list(own.rectangles), list(own.bits)
    for row, ((x, y, width, height), bits) in enumerate(zip(own.rectangles, own.bits, strict=True)):
        over = hidden[y : y + height, x : x + width]
        if not (over & (bits > 0)).any():
            kept.append(row)
            continue
        left = np.where(over, 0, bits)
        if not left.any():
            continue
        kept.append(row)
        before, after = mask_bounds(bits), mask_bounds(left)
        moved = np.array(after) != np.array(before)
        boxes[row] = np.where(moved, np.array(after) + (x, y, x, y), boxes[row])
        x1, y1, x2, y2 = after
        rectangles[row], all_bits[row] = (x + x1, y + y1, x2 - x1, y2 - y1), left[y1:y2, x1:x2]
    mine = MaskedObjects(boxes, own.labels, rectangles, all_bits).take(np.array(kept, dtype=np.int64))
    return _joined(mine, others), len(kept)


def _cut(objects: MaskedObjects, size: tuple[int, int]) -> MaskedObjects:
    """Those of which something is inside of an image of `size`, cut at its edges."""
    height, width = size
    boxes = np.clip(objects.boxes_xyxy, 0, np.array([width, height, width, height], dtype=np.float32))
    kept, rectangles, all_bits = [], [], []
    for row, ((x, y, _, _), bits) in enumerate(zip(objects.rectangles, objects.bits, strict=True)):
        inside = bits[: max(height - y, 0), : max(width - x, 0)]
        if inside.any() and (boxes[row, 2:] - boxes[row, :2] > MIN_CROPPED_BOX_SIDE).all():
            kept.append(row)
            rectangles.append((x, y, inside.shape[1], inside.shape[0]))
            all_bits.append(inside)
    rows = np.array(kept, dtype=np.int64)
    return MaskedObjects(boxes[rows], objects.labels[rows], rectangles, all_bits)


def _joined(one: MaskedObjects, other: MaskedObjects) -> MaskedObjects:
    return MaskedObjects(
        np.concatenate([one.boxes_xyxy, other.boxes_xyxy]),
        np.concatenate([one.labels, other.labels]),
        [*one.rectangles, *other.rectangles],
        [*one.bits, *other.bits],
    )
