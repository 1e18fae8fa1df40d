"""Pascal VOC's metric: the mean over classes of average precision at IoU 0.5.

The rules are those of the development kits (VOCevaldet.m of 2007 and 2012). A class's detections are taken by score.
One belongs to the box of its class and image that it overlaps most, where IoU is at least 0.5. The first on a box is
right, every other on it is wrong. Those on a difficult object (a crowd region here) count neither way, and such an
object need not be found. The kits count pixels and include the last one, so that a box is xmax - xmin + 1 wide. Boxes
here end behind their last pixel, which is the same width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from detection.evaluation.ground_truth import GroundTruth
from detection.evaluation.results import Detections

MODES = ("11points", "area")
"""AP of VOC2007: the mean of the highest precision at a recall of 0, 0.1, ... 1 or beyond. AP since VOC2010: the area
under the precision that is the highest at each recall or beyond."""
VOC = "voc_"
"""What the names of these figures begin with"""
_IOU = 0.5
_RECALLS = np.arange(0, 1.001, 0.1)


def voc_metrics(truth: GroundTruth, detections: Detections, mode: str) -> dict[str, Any]:
    """{"voc_mAP": a float in 0..1, or -1 where no box counts; "voc_per_class": {class name: AP, or -1}}.

    detections: on the images and of the categories of `truth`. mode: one of MODES.
    """
    assert mode in MODES
    images, labels = truth.places_of(detections)
    found = {}
    for label, name in enumerate(truth.class_names):
        boxes, rows = np.flatnonzero(truth.box_labels == label), np.flatnonzero(labels == label)
        rows = rows[np.argsort(-detections.scores[rows], kind="stable")]
        num_boxes = int((~truth.crowd[boxes]).sum())
        if num_boxes == 0:
            found[name] = -1.0
            continue
        order = np.argsort(truth.box_images[boxes], kind="stable")
        right, counts = _judged(
            images[rows],
            detections.boxes_xywh[rows].astype(np.float64),
            truth.box_images[boxes][order],
            truth.boxes_xywh[boxes][order],
            truth.crowd[boxes][order],
        )
        right = right[counts]
        true, total = np.cumsum(right), np.arange(1, len(right) + 1)
        found[name] = average_precision(true / num_boxes, true / total, mode)
    defined = [value for value in found.values() if value >= 0]
    return {f"{VOC}mAP": float(np.mean(defined)) if defined else -1.0, f"{VOC}per_class": found}


def average_precision(recall: npt.NDArray[np.float64], precision: npt.NDArray[np.float64], mode: str) -> float:
    """Of float64 [n] each, detection by detection, the surest first."""
    highest = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or beyond
    if mode == "area":
        return float((np.diff(recall, prepend=0.0) * highest).sum())
    at = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(highest, 0.0)[at].mean())


def _judged(
    images: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.float64],
    true_images: npt.NDArray[np.int64],
    true_boxes: npt.NDArray[np.float64],
    difficult: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Of one class's detections, the surest first: whether each is right, and whether it counts.

    Boxes are xywh; true ones are in the order of their images.
    """
    right, counts = np.zeros(len(images), dtype=bool), np.ones(len(images), dtype=bool)
    taken = np.zeros(len(true_images), dtype=bool)
    first, end = (np.searchsorted(true_images, images, side=side) for side in ("left", "right"))
    for row in np.flatnonzero(end > first).tolist():
        candidates = slice(int(first[row]), int(end[row]))
        overlaps = _iou(boxes[row], true_boxes[candidates])
        best = int(overlaps.argmax())
        if overlaps[best] >= _IOU:
            place = candidates.start + best
            counts[row] = not difficult[place]
            right[row] = counts[row] and not taken[place]
            taken[place] = True
    return right, counts


def _iou(box: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of one box [4] with others [n, 4], xywh: float64 [n]."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    shared = (high - low).clip(0).prod(axis=1)
    union = box[2:].prod() + others[:, 2:].prod(axis=1) - shared
    return shared / np.maximum(union, 1e-300)
