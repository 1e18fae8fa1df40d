"""RoIAlign over the levels of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

NUM_ROI_LEVELS = 4  # P2..P5; P6 serves the RPN only


def roi_levels(boxes_xyxy: Tensor, *, finest_scale: float, eps_inside_log: bool) -> Tensor:
    """Pyramid level of each RoI, 0 (P2) to 3 (P5): int64 [...] for boxes [..., 4].

    floor(log2(sqrt(area) / finest_scale)), Lin et al. 2017, equation 1; a small eps lets sizes at a boundary
    go up, inside the logarithm (MMDetection) or outside (torchvision).
    """
    sides = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    relative = (sides[..., 0] * sides[..., 1]).sqrt() / finest_scale
    eps = 1e-6
    exponent = torch.log2(relative + eps) if eps_inside_log else torch.log2(relative) + eps
    return exponent.floor().clamp(0, NUM_ROI_LEVELS - 1).long()


def pool_rois(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    levels: Tensor,
    strides: Sequence[int],
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign of boxes [B, R, 4], each from its level's map [B, C, H_l, W_l]: [B * R, C, output_size,
    output_size].
    """
    num_images, num_rois = levels.shape
    images = torch.arange(num_images, device=levels.device, dtype=boxes_xyxy.dtype)
    rois = torch.cat((images[:, None, None].expand(-1, num_rois, 1), boxes_xyxy), dim=2).view(-1, 5)
    pooled = None
    for level, (feature, stride) in enumerate(zip(features, strides, strict=False)):
        if level == NUM_ROI_LEVELS:
            break
        at_level = torchvision.ops.roi_align(
            feature.float(), rois, output_size, 1 / stride, sampling_ratio, aligned
        )
        mine = (levels.view(-1) == level)[:, None, None, None]
        pooled = at_level * mine if pooled is None else torch.where(mine, at_level, pooled)
    assert pooled is not None
    return pooled
