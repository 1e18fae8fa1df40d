"""Test-time augmentation: one picture looked at in several sizes and mirrored, the detections of all views merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from detection.models import Detector

DEFAULT_SCALES = (0.75, 1.0, 1.25)


@dataclass(frozen=True)
class View:
    """A way to look at a picture. scale: factor on the network's input sizes. flip: mirrored left to right."""

    scale: float = 1.0
    flip: bool = False


def make_views(scales: Sequence[float], *, flip: bool) -> tuple[View, ...]:
    """Every scale as it is, and with `flip` mirrored too."""
    return tuple(View(scale, flipped) for scale in scales for flipped in ((False, True) if flip else (False,)))


def predict_views(
    detector: Detector, pictures: Sequence[np.ndarray], views: Sequence[View], *, batch_size: int
) -> list[dict[str, Any]]:
    """What `detector.predict` gives (without names) for each picture, uint8 RGB [H, W, 3], merged over the views."""
    of_views = []
    for view in views:
        at_scale = dataclasses.replace(
            detector,
            min_size=max(1, round(detector.min_size * view.scale)),
            max_size=max(1, round(detector.max_size * view.scale)),
        )
        shown = [np.ascontiguousarray(pixels[:, ::-1]) if view.flip else pixels for pixels in pictures]
        results = at_scale.predict(shown, batch_size=batch_size)
        if view.flip:
            for found, pixels in zip(results, pictures, strict=True):
                found["boxes_xyxy"] = mirror(found["boxes_xyxy"], pixels.shape[1])
        of_views.append(results)
    config = detector.model.config
    return [
        merge_views(found, nms_iou=config.nms_iou, most=config.detections_per_image)
        for found in zip(*of_views, strict=True)
    ]


def mirror(boxes_xyxy: Tensor, width: int) -> Tensor:
    """Boxes [N, 4] of a mirrored picture in the picture itself: x1 = width - x2', x2 = width - x1'."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    return torch.stack((width - x2, y1, width - x1, y2), dim=-1)


def merge_views(found: Sequence[Mapping[str, Any]], *, nms_iou: float, most: int) -> dict[str, Tensor]:
    """Detections of one picture in all its views: greedy suppression within each class, the `most` best of the rest.

    The model's own rule for its proposals, applied once more, so that scores keep their meaning.
    """
    boxes, scores, labels = (torch.cat([view[key] for view in found]) for key in ("boxes_xyxy", "scores", "labels"))
    keep = torchvision.ops.batched_nms(boxes, scores, labels, nms_iou)[:most]
    return {"boxes_xyxy": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
