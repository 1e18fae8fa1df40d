"""Losses of predicted boxes against the boxes that they are to be, as the overlap measures them.

The formulas and their epsilons are those of MMDetection 3. torchvision's of the same names differ: its complete IoU
weighs the ratio of the sides at any overlap, and all of them choose rows by a mask, for which a GPU's queue is emptied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detection.models.ops.boxes import centers_and_sides

BOX_LOSSES: tuple[str, ...] = ("iou", "giou", "diou", "ciou", "bounded_iou")
_EPS = 1e-6
_EPS_BOUNDED = 1e-3
_BETA_BOUNDED = 0.2


def overlap_loss(kind: str, boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
    """The loss of each box, float32 [N], from [N, 4] and [N, 4]. kind: one of BOX_LOSSES.

    iou: -log of the IoU (Yu et al. 2016). giou: Rezatofighi et al. 2019. diou, ciou: Zheng et al. 2020; ciou weighs the
    ratio of the sides only where the IoU is above a half. bounded_iou: Tychsen-Smith and Petersson 2018, the sum over
    center and sides.
    """
    if kind == "bounded_iou":
        return _bounded_iou_loss(boxes_xyxy, targets_xyxy)
    starts, ends = (torch.stack((boxes_xyxy[:, part], targets_xyxy[:, part])) for part in (slice(2), slice(2, 4)))
    intersection = (ends.amin(dim=0) - starts.amax(dim=0)).clamp(min=0).prod(dim=1)
    x, y, width, height = centers_and_sides(boxes_xyxy)
    target_x, target_y, target_width, target_height = centers_and_sides(targets_xyxy)
    union = width * height + target_width * target_height - intersection
    if kind == "iou":
        return -(intersection / union.clamp(min=_EPS)).clamp(min=_EPS).log()
    hull = (ends.amax(dim=0) - starts.amin(dim=0)).clamp(min=0)
    if kind == "giou":
        hull_area = hull.prod(dim=1).clamp(min=_EPS)
        union = union.clamp(min=_EPS)
        return 1 - intersection / union + (hull_area - union) / hull_area
    iou = intersection / (union + _EPS)
    apart = ((target_x - x) ** 2 + (target_y - y) ** 2) / (hull.square().sum(dim=1) + _EPS)
    if kind == "diou":
        return 1 - iou + apart
    angle = torch.atan(target_width / (target_height + _EPS)) - torch.atan(width / (height + _EPS))
    ratio = 4 / math.pi**2 * angle**2
    with torch.no_grad():
        # Theirs is 0 / 0 where the boxes are equal to the last bit.
        weight = (iou > 0.5) * ratio / (1 - iou + ratio).clamp(min=_EPS)
    return 1 - (iou - apart - weight * ratio).clamp(-1, 1)


def _bounded_iou_loss(boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
    """The most that each of x, y, width and height alone could leave of the IoU, as smooth L1."""
    x, y, width, height = centers_and_sides(boxes_xyxy)
    target_x, target_y, target_width, target_height = centers_and_sides(targets_xyxy)
    losses = []
    for distance, side in (((target_x - x).abs(), target_width), ((target_y - y).abs(), target_height)):
        losses.append(1 - ((side - 2 * distance) / (side + 2 * distance + _EPS_BOUNDED)).clamp(min=0))
    for side, target_side in ((width, target_width), (height, target_height)):
        smaller = torch.minimum(target_side / (side + _EPS_BOUNDED), side / (target_side + _EPS_BOUNDED))
        losses.append(1 - smaller)
    loss = torch.stack(losses, dim=1)
    beta = _BETA_BOUNDED
    return torch.where(loss < beta, 0.5 * loss * loss / beta, loss - 0.5 * beta).sum(dim=1)
