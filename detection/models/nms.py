"""Non-maximum suppression of a whole batch's proposals: fixed shapes in, fixed shapes out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor


def suppress(
    boxes_xyxy: Tensor, scores: Tensor, valid: Tensor, per_level: Sequence[int], iou_threshold: float
) -> Tensor:
    """Greedy suppression within each image and level: which boxes are kept, bool [B, N].

    boxes_xyxy: float32 [B, N, 4], all coordinates at least 0; scores: float32 [B, N]; valid: bool [B, N], the others
    neither suppress nor are kept; per_level: how many of the N boxes belong to each level, in order. A box goes when
    its IoU with a better kept one is above iou_threshold.

    Boxes are first shifted by level * (largest coordinate of the image + 1) in float32, as mmcv's batched_nms does:
    the rounding of that shift decides pairs at the threshold.
    """
    largest = torch.where(valid[..., None], boxes_xyxy, 0.0).amax(dim=(1, 2))
    steps = (largest + 1)[:, None, None]
    levels = boxes_xyxy.split(list(per_level), dim=1)
    shifted = torch.cat([boxes + level * steps for level, boxes in enumerate(levels)], dim=1)
    ranking = torch.where(valid, scores, -torch.inf)
    if boxes_xyxy.device.type == "cpu":
        keep = _one_call_per_level(shifted, ranking, per_level, iou_threshold)
    else:
        keep = _one_call(shifted, ranking, iou_threshold)
    return keep & valid


# One operator with a result of fixed shape, so that compilers and profilers see a step without data-dependent shapes.
suppress_within_levels = torch.library.custom_op("detection::suppress_within_levels", suppress, mutates_args=())


@suppress_within_levels.register_fake
def _(boxes_xyxy: Tensor, scores: Tensor, valid: Tensor, per_level: Sequence[int], iou_threshold: float) -> Tensor:
    return torch.empty_like(valid)


def _one_call_per_level(boxes: Tensor, ranking: Tensor, per_level: Sequence[int], iou_threshold: float) -> Tensor:
    # The operator's time grows with the square of its boxes (0.4 s for two images at once, 0.1 s for their
    # levels one by one), and on the CPU a call makes no one wait.
    keep = torch.zeros(ranking.shape, dtype=torch.bool)
    for image in range(len(boxes)):
        start = 0
        for count in per_level:
            level = slice(start, start + count)
            kept = torchvision.ops.nms(boxes[image, level], ranking[image, level], iou_threshold)
            keep[image, level].index_fill_(0, kept, True)
            start += count
    return keep


def _one_call(boxes: Tensor, ranking: Tensor, iou_threshold: float) -> Tensor:
    # The size of the operator's result is the training step's one synchronisation with the host, so all
    # images share one call, side by side. In float64 their distance costs no digits of the coordinates.
    boxes = boxes.double()
    distance = boxes.amax() + 1
    places = torch.arange(len(boxes), device=boxes.device)[:, None, None]
    side_by_side = (boxes + places * distance).view(-1, 4)
    kept = torchvision.ops.nms(side_by_side, ranking.double().view(-1), iou_threshold)
    keep = torch.zeros(ranking.numel(), dtype=torch.bool, device=boxes.device)
    return keep.index_fill_(0, kept, True).view(ranking.shape)
