"""Test-time augmentation: one image looked at in several sizes and mirrored, the detections of all views fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection.models import Detector
from detection.models.ops.boxes import pairwise_iou

DEFAULT_SCALES = (0.75, 1.0, 1.25)
FUSION_IOU = 0.55  # Solovyev et al. 2021, section 3.1


@dataclass(frozen=True)
class View:
    """A way to look at an image. scale: factor on the network's input sizes. flip: mirrored left to right."""

    scale: float = 1.0
    flip: bool = False


def make_views(scales: Sequence[float], *, flip: bool) -> tuple[View, ...]:
    """Every scale as it is, and with `flip` mirrored too."""
    return tuple(View(scale, flipped) for scale in scales for flipped in ((False, True) if flip else (False,)))


def predict_views(
    detector: Detector, images: Sequence[np.ndarray], views: Sequence[View], *, batch_size: int
) -> list[dict[str, Any]]:
    """What `detector.predict` gives (without names) for each image, uint8 RGB [H, W, 3], fused over the views."""
    of_views = []
    for view in views:
        at_scale = dataclasses.replace(
            detector,
            min_size=max(1, round(detector.min_size * view.scale)),
            max_size=max(1, round(detector.max_size * view.scale)),
        )
        shown = [np.ascontiguousarray(pixels[:, ::-1]) if view.flip else pixels for pixels in images]
        results = at_scale.predict(shown, batch_size=batch_size)
        if view.flip:
            for found, pixels in zip(results, images, strict=True):
                found["boxes_xyxy"] = mirror(found["boxes_xyxy"], pixels.shape[1])
                if "mask_probabilities" in found:
                    found["mask_probabilities"] = found["mask_probabilities"].flip(2)
        of_views.append(results)
    most = detector.model.config.detections_per_image
    return [fuse_views(found, most=most) for found in zip(*of_views, strict=True)]


def mirror(boxes_xyxy: Tensor, width: int) -> Tensor:
    """Boxes [N, 4] of a mirrored image in the image itself: x1 = width - x2', x2 = width - x1'."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    return torch.stack((width - x2, y1, width - x1, y2), dim=-1)


def fuse_views(found: Sequence[Mapping[str, Any]], *, most: int) -> dict[str, Any]:
    """Detections of one image in all its views, by weighted box fusion (Solovyev et al. 2021), the `most` best.

    Best first, each detection joins the group of its class that it overlaps most, if by more than FUSION_IOU, or begins
    one. A group's box is the mean of its boxes, weighted by their scores; its score is the mean of their scores, times
    the share of the views that found it. Masks are averaged as the boxes are. One view is left as it is.
    """
    if len(found) == 1:
        return {key: value for key, value in found[0].items() if key != "names"}
    has_masks = all("mask_probabilities" in view for view in found)
    boxes, scores, labels = (torch.cat([view[key] for view in found]) for key in ("boxes_xyxy", "scores", "labels"))
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, labels = boxes[order], scores[order], labels[order]
    fused, weighted = torch.zeros_like(boxes), torch.zeros_like(boxes)
    totals, sizes, group_labels = torch.zeros_like(scores), torch.zeros_like(scores), torch.full_like(labels, -1)
    num_groups = 0
    masks = torch.cat([view["mask_probabilities"] for view in found])[order] if has_masks else boxes[:, :0]
    weighted_masks = torch.zeros_like(masks)
    for row in range(len(boxes)):
        overlap = pairwise_iou(boxes[row : row + 1], fused[:num_groups])[0]
        overlap = torch.where(group_labels[:num_groups] == labels[row], overlap, 0.0)
        group = int(overlap.argmax()) if num_groups else 0
        if num_groups == 0 or overlap[group] <= FUSION_IOU:
            group, num_groups = num_groups, num_groups + 1
            group_labels[group] = labels[row]
        weighted[group] += boxes[row] * scores[row]
        weighted_masks[group] += masks[row] * scores[row]
        totals[group] += scores[row]
        sizes[group] += 1
        fused[group] = weighted[group] / totals[group]
    group_scores = totals[:num_groups] / sizes[:num_groups] * sizes[:num_groups].clamp(max=len(found)) / len(found)
    best = group_scores.argsort(descending=True, stable=True)[:most]
    results = {"boxes_xyxy": fused[best], "scores": group_scores[best], "labels": group_labels[best]}
    if has_masks:
        results["mask_probabilities"] = weighted_masks[best] / totals[best, None, None]
    return results
