"""Bitmaps cut out at RoIs and averaged to small squares: what a mask head learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detection.models.ops.backend import implementation_of

# Elements of the largest tensor of one block. On the CPU blocks that stay in the cache are faster.
_BLOCK_ON_CPU = 1 << 20
_BLOCK_ON_DEVICE = 1 << 26


class MaskCrops(NamedTuple):
    """RoIs, and the bitmap that each is cut from: the crop of one, as `MaskBatch` has it.

    boxes_xyxy: float32 [R, 4] in pixels. bits: uint8 [P]. offsets: int64 [R]. rectangles: int64 [R, 4].
    """

    boxes_xyxy: Tensor
    bits: Tensor
    offsets: Tensor
    rectangles: Tensor


def crop_masks(crops: MaskCrops, image_size: tuple[int, int], *, size: int, aligned: bool) -> Tensor:
    """RoIAlign of the whole bitmaps: the share of each cell that is covered, float32 [R, size, size].

    One sample a pixel (sampling ratio 0). image_size: height and width of the padded images, at which the RoIs end.
    """
    height, width = image_size
    boxes = crops.boxes_xyxy.float().clone()
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    crops = crops._replace(boxes_xyxy=boxes)
    name = implementation_of("mask_crops", crops.bits.device)
    if name == "triton":
        return by_triton(crops, image_size, size=size, aligned=aligned)
    return by_matrices(crops, image_size, size=size, aligned=aligned, trimmed=name == "trimmed")


def by_triton(crops: MaskCrops, image_size: tuple[int, int], *, size: int, aligned: bool) -> Tensor:
    """Sample by sample, on a GPU."""
    from detection.models.ops.triton.mask_crops import crop_bitmaps

    return crop_bitmaps(*crops, image_size, size=size, aligned=aligned)


def by_matrices(
    crops: MaskCrops, image_size: tuple[int, int], *, size: int, aligned: bool, trimmed: bool = False
) -> Tensor:
    """As products of interpolation matrices, rows x bitmap x columns, a block of RoIs at a time.

    trimmed: the blocks are as large as their bitmaps, which only the CPU sees without waiting; otherwise as images.
    """
    height, width = image_size
    found = torch.empty((len(crops.offsets), size, size), device=crops.bits.device)
    blocks = _trimmed_blocks(crops, size) if trimmed else _equal_blocks(crops, image_size, size)
    for rois, num_rows, num_columns, most_samples in blocks:
        x, y, crop_width, crop_height = crops.rectangles[rois].unbind(1)
        x1, y1, x2, y2 = crops.boxes_xyxy[rois].unbind(1)
        rows = _axis_weights(y1, y2, y, crop_height, height, size, aligned, num_rows, most_samples)
        columns = _axis_weights(x1, x2, x, crop_width, width, size, aligned, num_columns, most_samples)
        if trimmed:  # the crops as they lie in memory, instead of indices of all their pixels
            for slot, roi in enumerate(rois.tolist()):
                first, (_, _, w, h) = int(crops.offsets[roi]), crops.rectangles[roi].tolist()
                bitmap = crops.bits[first : first + h * w].view(h, w).float()
                found[roi] = rows[slot, :, :h] @ bitmap @ columns[slot, :, :w].T
            continue
        in_row = torch.arange(num_columns, device=x.device)
        of_row = torch.arange(num_rows, device=x.device)[:, None] * crop_width[:, None, None]
        # What is read beside a crop has no weight.
        place = (crops.offsets[rois][:, None, None] + of_row + in_row).clamp_(max=len(crops.bits) - 1)
        found[rois] = rows @ crops.bits[place].float() @ columns.transpose(1, 2)
    return found


def _axis_weights(
    lows: Tensor,
    highs: Tensor,
    firsts: Tensor,
    lengths: Tensor,
    map_length: int,
    size: int,
    aligned: bool,
    extent: int,
    most_samples: int,
) -> Tensor:
    """Weight of each pixel of a crop in each bin, along one axis: float32 [R, size, extent]."""
    roi_lengths = highs - lows
    if aligned:
        lows = lows - 0.5
    else:
        roi_lengths = roi_lengths.clamp(min=1)
    bin_lengths = (roi_lengths / size)[:, None, None]
    num_samples = bin_lengths.ceil()
    samples = torch.arange(most_samples, device=lows.device)
    bins = torch.arange(size, device=lows.device)[:, None]
    places = lows[:, None, None] + bins * bin_lengths + (samples + 0.5) * bin_lengths / num_samples.clamp(min=1)
    used = ((samples < num_samples) & (places >= -1) & (places <= map_length)).float()
    places = places.clamp_(0, map_length - 1)
    before = places.floor()
    fractions = (places - before) * used
    # A place for all pixels before the crop, and one for all behind it.
    weights = torch.zeros((len(lows), size, extent + 2), device=lows.device)
    index = before.long() - firsts[:, None, None] + 1
    weights.scatter_add_(2, index.clamp(0, extent + 1), used - fractions)
    weights.scatter_add_(2, (index + 1).clamp_(0, extent + 1), fractions)
    outside = torch.arange(extent, device=lows.device) >= lengths[:, None]
    return weights[:, :, 1:-1].div(num_samples.clamp(min=1)).masked_fill_(outside[:, None], 0)


Block = tuple[Tensor, int, int, int]
"""RoIs int64 [C], and for all of them: rows, columns, samples a bin and axis."""


def _equal_blocks(crops: MaskCrops, image_size: tuple[int, int], size: int) -> Iterator[Block]:
    longest = max(image_size)
    most_samples = -(-longest // size)
    elements = max(image_size[0] * image_size[1], size * longest)
    rois = torch.arange(len(crops.offsets), device=crops.bits.device)
    for block in rois.split(max(1, _BLOCK_ON_DEVICE // elements)):
        yield block, *image_size, most_samples


def _trimmed_blocks(crops: MaskCrops, size: int) -> Iterator[Block]:
    """Of RoIs with crops, and samples, of similar sizes."""
    widths, heights = crops.rectangles[:, 2:].numpy().T
    sides = (crops.boxes_xyxy[:, 2:] - crops.boxes_xyxy[:, :2]).numpy().max(axis=1, initial=0)
    samples = np.ceil(sides / size).clip(1).astype(np.int64)
    longest = np.maximum(widths, heights)
    elements = np.maximum(widths * heights, size * np.maximum(samples, longest))
    order = np.argsort(elements, kind="stable")
    first = 0
    while first < len(order):
        stop = first + 1
        while stop < len(order) and elements[order[stop]] * (stop + 1 - first) <= _BLOCK_ON_CPU:
            stop += 1
        block = order[first:stop]
        most_rows, most_columns, most_samples = (max(1, int(each[block].max())) for each in (heights, widths, samples))
        yield torch.from_numpy(block), most_rows, most_columns, most_samples
        first = stop
