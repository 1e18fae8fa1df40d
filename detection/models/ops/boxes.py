"""Arithmetic of boxes: overlap, the delta encoding of Faster R-CNN, clipping. All of it in float32.

Boxes are (x1, y1, x2, y2) in pixels, `boxes_xyxy` [..., 4]; a box's width is x2 - x1. Leading dimensions
broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)
"""Largest change of a side's logarithm that a decoded delta may make (both reference implementations)."""

_SMALLEST_UNION = 1e-6  # MMDetection's bbox_overlaps; keeps the IoU of two empty boxes at 0


def pairwise_iou(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor) -> Tensor:
    """Intersection over union of [..., A, 4] with [..., B, 4]: [..., A, B]."""
    a_x1, a_y1, a_x2, a_y2 = boxes_a_xyxy[..., :, None, :].unbind(-1)
    b_x1, b_y1, b_x2, b_y2 = (side.contiguous() for side in boxes_b_xyxy[..., None, :, :].unbind(-1))
    widths = torch.minimum(a_x2, b_x2).sub_(torch.maximum(a_x1, b_x1)).clamp_(min=0)
    heights = torch.minimum(a_y2, b_y2).sub_(torch.maximum(a_y1, b_y1)).clamp_(min=0)
    intersection = widths.mul_(heights)
    areas = (a_x2 - a_x1) * (a_y2 - a_y1) + (b_x2 - b_x1) * (b_y2 - b_y1)
    union = areas.sub_(intersection)
    return intersection.div_(union.clamp_(min=_SMALLEST_UNION))


def encode_boxes(targets_xyxy: Tensor, references_xyxy: Tensor, stds: Sequence[float]) -> Tensor:
    """Deltas (dx, dy, dw, dh) [..., 4] that turn the references into the targets, divided by `stds`.

    dx and dy are the center's shift in reference widths and heights, dw and dh logarithms of the sides'
    ratios (Girshick et al. 2014, appendix C). Empty boxes give infinities or NaN: mask them.
    """
    x, y, width, height = centers_and_sides(references_xyxy)
    target_x, target_y, target_width, target_height = centers_and_sides(targets_xyxy)
    return torch.stack(
        (
            (target_x - x) / width / stds[0],
            (target_y - y) / height / stds[1],
            torch.log(target_width / width) / stds[2],
            torch.log(target_height / height) / stds[3],
        ),
        dim=-1,
    )


def decode_boxes(deltas: Tensor, references_xyxy: Tensor, stds: Sequence[float], *, clip_shrinking: bool) -> Tensor:
    """Inverse of `encode_boxes`: boxes_xyxy [..., 4].

    Sides grow at most 1000/16 times; with clip_shrinking they shrink at most as much.
    """
    x, y, width, height = centers_and_sides(references_xyxy)
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas.unbind(-1), stds, strict=True))
    lowest = -MAX_LOG_SCALE if clip_shrinking else None
    centre_x = x + width * dx
    centre_y = y + height * dy
    half_width = width * dw.clamp(lowest, MAX_LOG_SCALE).exp() * 0.5
    half_height = height * dh.clamp(lowest, MAX_LOG_SCALE).exp() * 0.5
    return torch.stack(
        (centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height), dim=-1
    )


def clip_boxes(boxes_xyxy: Tensor, sizes: Tensor) -> Tensor:
    """Cuts boxes [B, N, 4] at the edges of images with `sizes` (height, width) [B, 2]."""
    limits = sizes.flip(-1).repeat(1, 2)[:, None].to(boxes_xyxy.dtype)  # x, y, x, y
    return torch.minimum(boxes_xyxy.clamp(min=0), limits)


def sides_above(boxes_xyxy: Tensor, min_size: float) -> Tensor:
    """Which boxes [..., 4] have both sides above `min_size`: bool [...]."""
    sides = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return (sides > min_size).all(dim=-1)


def centers_and_sides(boxes_xyxy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    return (x1 + x2) * 0.5, (y1 + y2) * 0.5, x2 - x1, y2 - y1
