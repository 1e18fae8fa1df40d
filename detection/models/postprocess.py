"""Outputs of the second stage to an image's final detections."""

from __future__ import annotations

import numpy as np
import torch
import torchvision
from torch import Tensor

from detection.models.config import FasterRCNNConfig
from detection.models.ops.boxes import clip_boxes, decode_boxes, pairwise_iou, sides_above

Detections = dict[str, Tensor]
"""Of one image, best first: boxes_xyxy float32 [D, 4] at the network's scale, scores float32 [D], labels
int64 [D]; of a model with masks also mask_probabilities float32 [D, 28, 28].
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
    the rest. What is not finite is no detection. With soft_nms scores may end below the threshold.

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
        if config.soft_nms is None:
            keep = torchvision.ops.batched_nms(boxes, image_scores, label, config.nms_iou)
        else:
            keep, image_scores = lowered_scores(config, boxes, image_scores, label)
        keep = keep[: config.detections_per_image]
        detections.append({"boxes_xyxy": boxes[keep], "scores": image_scores[keep], "labels": label[keep]})
    return detections


def lowered_scores(
    config: FasterRCNNConfig, boxes_xyxy: Tensor, scores: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Soft-NMS within each class: the order of the boxes that are left, int64 [D], and all scores, float32 [N].

    boxes_xyxy float32 [N, 4], labels int64 [N]. One box after the other lowers the scores of those behind it, so that
    it is computed on the host.
    """
    lowered = scores.cpu().numpy().copy()
    host_boxes, host_labels = boxes_xyxy.cpu(), labels.cpu().numpy()
    for label in np.unique(host_labels):
        rows = (host_labels == label).nonzero()[0]
        overlaps = pairwise_iou(host_boxes[rows], host_boxes[rows])
        if config.soft_nms == "linear":
            factors = torch.where(overlaps >= config.nms_iou, 1 - overlaps, 1.0).numpy()
        else:
            factors = torch.exp(-overlaps.square() / config.soft_nms_sigma).numpy()
        left = lowered[rows]
        for _ in range(len(rows)):
            best = left.argmax()
            if left[best] < config.soft_nms_min_score:
                break
            lowered[rows[best]] = left[best]
            left *= factors[best]
            left[best] = -np.inf
        lowered[rows[left > -np.inf]] = -np.inf
    result = torch.from_numpy(lowered).to(scores.device)
    order = result.argsort(descending=True, stable=True)
    return order[: int((lowered > -np.inf).sum())], result
