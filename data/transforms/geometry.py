"""Geometry of what the model is fed: sizes, boxes, flips, and the pixels that follow them.

The numbers are those of MMDetection 3's Resize(keep_ratio=True), RandomFlip and batch padding with mmcv 2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

PADDING_MULTIPLE = 32
"""Sides of a batch are multiples of the backbone's largest stride."""

MIN_BOX_SIDE = 1e-3
"""Pixels at the network's scale. See resize_boxes."""

MIN_CROPPED_BOX_SIDE = 1e-2
"""Pixels that must be left of a box after a crop: those of MMDetection's large-scale jitter
(FilterAnnotations with min_gt_bbox_wh=(1e-2, 1e-2))."""


def resized_sizes(
    widths: np.ndarray, heights: np.ndarray, *, min_size: int | np.ndarray, max_size: int | np.ndarray
) -> np.ndarray:
    """Sizes after a resize that keeps the ratio: int64 [N, 2] (height, width) from int64 [N] each.

    min_size and max_size are one for all images, or int64 [N].

    The shorter side becomes min_size unless the longer would exceed max_size; small images are enlarged.
    f = min(max_size / longer, min_size / shorter) in float64, each side becomes int(side * f + 0.5).
    An image thousands of times longer than wide keeps one pixel of width.
    """
    longer, shorter = np.maximum(widths, heights), np.minimum(widths, heights)
    factors = np.minimum(max_size / longer, min_size / shorter)
    sizes = np.stack([heights * factors + 0.5, widths * factors + 0.5], axis=-1).astype(np.int64)
    return np.maximum(sizes, 1)


def padded_size(sizes: np.ndarray) -> np.ndarray:
    """Size of the batch that holds images of the given sizes: the largest height and the largest width,
    each rounded up to PADDING_MULTIPLE. int64 [..., B, 2] -> int64 [..., 2] (height, width)."""
    return -(-sizes.max(axis=-2) // PADDING_MULTIPLE) * PADDING_MULTIPLE


def scale_factors(native_sizes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(x, y) factors of a resize, float32 [..., 2], from sizes [..., 2] (height, width) before and after.

    They differ from each other and from the factor the sizes were computed with, as sides are whole pixels.
    """
    return (sizes / native_sizes)[..., ::-1].astype(np.float32)


def resize_boxes(boxes_xyxy: np.ndarray, factors: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes after the resize, clipped to the image, and which of them can be trained on.

    boxes_xyxy float32 [N, 4] in stored pixels, factors float32 [2] (x, y), size (height, width)
    after the resize. Returns float32 [N, 4] and bool [N]; no row is dropped. Annotations without overlap with
    the image are left out while reading, so a box that is empty after the clip can only stem from an
    overlap of a fraction of a thousandth pixel; but the logarithm of its width would make every weight of the
    model NaN, so boxes with a side under MIN_BOX_SIDE are marked as not valid.
    """
    height, width = size
    resized = boxes_xyxy * np.tile(factors, 2)
    np.clip(resized, 0, np.array([width, height, width, height], dtype=np.float32), out=resized)
    return resized, ((resized[:, 2:] - resized[:, :2]) >= MIN_BOX_SIDE).all(axis=1)


def flip_boxes(boxes_xyxy: np.ndarray, side: int, *, axis: int) -> np.ndarray:
    """Boxes (float32 [N, 4]) of the image mirrored left to right (axis 0, side: its width) or turned upside down
    (axis 1, side: its height): x1' = width - x2, x2' = width - x1, and y alike."""
    flipped = boxes_xyxy.copy()
    flipped[:, axis::2] = side - boxes_xyxy[:, axis::2][:, ::-1]
    return flipped


def crop_boxes(
    boxes_xyxy: np.ndarray, offset: Sequence[int] | np.ndarray, size: tuple[int, int], *, min_visibility: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in the coordinates of a crop, clipped to it, and which of them are left.

    boxes_xyxy float32 [N, 4], offset (top, left) and size (height, width) of the crop, all in pixels of the
    uncropped image. Returns float32 [N, 4] and bool [N]; no row is dropped. A box is left when both sides
    of what the crop shows of it are longer than MIN_CROPPED_BOX_SIDE and that is at least min_visibility (0 to
    1) of its area.
    """
    (top, left), (height, width) = offset, size
    moved = boxes_xyxy - np.array([left, top, left, top], dtype=np.float32)
    cropped = np.clip(moved, 0, np.array([width, height, width, height], dtype=np.float32))
    sides, whole = cropped[:, 2:] - cropped[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    left_over = (sides > MIN_CROPPED_BOX_SIDE).all(axis=1)
    # Areas as float64: the whole of a box that is not cut must not lose a last bit to a threshold of 1.
    return cropped, left_over & (
        sides.prod(axis=1, dtype=np.float64) >= min_visibility * whole.prod(axis=1, dtype=np.float64) * (1 - 1e-6)
    )


def mask_bounds(bits: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of the ones in a mask (uint8 or bool [h, w]) that has some."""
    columns, rows = (np.flatnonzero(bits.any(axis=axis)) for axis in (0, 1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where N native images go: resized to scaled_sizes, cut from offsets to sizes, then flipped."""

    scaled_sizes: np.ndarray
    """int64 [N, 2] (height, width) of the whole image after the resize"""
    offsets: np.ndarray
    """int64 [N, 2] (top, left) of the crop in it"""
    sizes: np.ndarray
    """int64 [N, 2] (height, width) of the crop; scaled_sizes where nothing is cut off"""
    flips: np.ndarray
    """bool [N], mirrored left to right"""
    vertical_flips: np.ndarray
    """bool [N], turned upside down"""
    padded_size: tuple[int, int]
    """(height, width) of a batch of all these images"""
    min_visibility: float = 0.0
    """Part of a box's area that the crop must leave of it, 0 to 1"""
    boxes_of_masks: bool = False
    """Boxes are the bounds of what the crop shows of the masks; an object without a pixel there is gone"""

    def of_images(self, which: np.ndarray) -> "Geometry":
        """That of some of the images (int64 [n]), padded as all are."""
        arrays = {name: value[which] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)

    def move_boxes(self, i: int, boxes_xyxy: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (float32 [M, 4], stored pixels) of image i where it goes, and which of them can be trained on.

        factors: float32 [2], see scale_factors. Returns float32 [M, 4] and bool [M]; no row is dropped.
        """
        height, width = self.scaled_sizes[i].tolist()
        boxes, valid = resize_boxes(boxes_xyxy, factors, (height, width))
        if (self.sizes[i] != self.scaled_sizes[i]).any():
            height, width = self.sizes[i].tolist()
            boxes, left = crop_boxes(boxes, self.offsets[i], (height, width), min_visibility=self.min_visibility)
            valid = valid & left
        if self.flips[i]:
            boxes = flip_boxes(boxes, width, axis=0)
        if self.vertical_flips[i]:
            boxes = flip_boxes(boxes, height, axis=1)
        return boxes, valid

    def move_bitmaps(
        self, i: int, native_size: tuple[int, int], bitmaps: Sequence[tuple[int, int, np.ndarray]]
    ) -> Iterator[tuple[tuple[int, int, int, int], np.ndarray]]:
        """Bitmaps of image i where it goes: pixels are repeated or left out, none is mixed.

        bitmaps: left, top and uint8 [h, w] each, parts of bitmaps of native_size (height, width). Yields the rectangle
        (x, y, width, height) of each in the image's new pixels, and uint8 [height, width]; nothing is outside of it.

        The pixels are those of OpenCV's INTER_NEAREST: x comes from floor(x / (new width / width)), in float64.
        """
        axes = []
        for axis, flip in ((1, self.flips[i]), (0, self.vertical_flips[i])):
            scaled, offset, size = (int(sides[i, axis]) for sides in (self.scaled_sizes, self.offsets, self.sizes))
            step = 1.0 / (scaled / native_size[axis])
            sources = np.floor(np.arange(offset, offset + size) * step).astype(np.int64)
            axes.append((np.minimum(sources, native_size[axis] - 1), size, flip))
        for left, top, bits in bitmaps:
            rectangle, picked = [], []
            for (sources, size, flip), start, side in zip(axes, (left, top), bits.shape[::-1], strict=True):
                first, last = np.searchsorted(sources, (start, start + side)).tolist()
                inside = sources[first:last] - start
                picked.append(inside[::-1] if flip else inside)
                rectangle += [size - last if flip else first, last - first]
            x, width, y, height = rectangle
            yield (x, y, width, height), bits[:, picked[0]][picked[1]]


def resize_pixels(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize without antialiasing (also when shrinking): uint8 [1, 3, h, w] -> uint8 [1, 3, H, W].

    Equal to OpenCV's INTER_LINEAR (MMDetection's) but for rounding: no pixel differs by more than 1 gray
    level. OpenCV rounds its weights to 1/2048, torch's kernel for bytes (CPU) to 16 bits and rounds between
    the two directions, the float path (CUDA) rounds once at the end. On the CPU an image with channels last
    in memory takes a third of the time.
    """
    if image.device.type == "cpu":
        return F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=False)
    resized = F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False, antialias=False)
    return resized.round_().to(torch.uint8)
