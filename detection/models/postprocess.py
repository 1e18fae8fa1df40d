"""Outputs of the second stage to an image's final detections."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from detection.models.config import FasterRCNNConfig
from detection.models.ops.boxes import clip_boxes, decode_boxes, sides_above

Detections = dict[str, Tensor]
"""Of one image, best first: boxes_xyxy float32 [D, 4] at the network's scale, scores float32 [D], labels
int64 [D].
"""


@torch.no_grad()
def select_detections(
    config: FasterRCNNConfig,
    class_logits: Tensor,
    deltas: Tensor,
    boxes_xyxy: Tensor,
    valid: Tensor,
    sizes: Tensor,
) -> list[Detections]:
    """Scores above the threshold, decoded and clipped to the image, suppressed within each class, the best of
    the rest. What is not finite is no detection.

    class_logits [B * P, K + 1], deltas [B * P, classes, 4] (of each class, or of all together), boxes_xyxy float32
    [B, P, 4] (the RoIs), valid bool [B, P], sizes int64 [B, 2].
    """
    num_images, num_rois = valid.shape
    scores = class_logits.float().softmax(dim=1)[:, : config.num_classes].view(num_images, num_rois, -1)
    deltas = deltas.view(num_images, num_rois, -1, 4)
    # A score that is NaN is above no threshold.
    usable = deltas.isfinite().all(dim=3)[..., : config.num_classes]
    usable = usable & (valid & boxes_xyxy.isfinite().all(dim=2))[..., None]
    detections = []
    for image in range(num_images):
        roi, label = ((scores[image] > config.score_threshold) & usable[image]).nonzero(as_tuple=True)
        image_scores = scores[image][roi, label]
        boxes = decode_boxes(
            deltas[image][roi, label.clamp(max=deltas.shape[2] - 1)].float(),
            boxes_xyxy[image][roi],
            config.roi_delta_stds,
            clip_shrinking=config.clip_shrinking,
        )
        boxes = clip_boxes(boxes[None], sizes[image : image + 1])[0]
        if config.detection_min_size is not None:
            large = sides_above(boxes, config.detection_min_size)
            boxes, image_scores, label = boxes[large], image_scores[large], label[large]
        keep = torchvision.ops.batched_nms(boxes, image_scores, label, config.nms_iou)
        keep = keep[: config.detections_per_image]
        detections.append({"boxes_xyxy": boxes[keep], "scores": image_scores[keep], "labels": label[keep]})
    return detections
