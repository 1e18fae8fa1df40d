"""What each detection is: correct, or wrong in one of the ways that TIDE tells apart.

Source of the error types: D. Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors",
ECCV 2020, with the order of its tests; matching is COCOeval's at one IoU threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from data.coco.run_lengths import RunLengths
from detection.evaluation.federated import MAX_DETECTIONS as MAX_DETECTIONS_OF_LVIS
from detection.evaluation.ground_truth import GroundTruth
from detection.evaluation.results import Detections

Shapes = npt.NDArray[np.float64] | RunLengths
"""Boxes xywh [n, 4], or masks"""
MAX_DETECTIONS = 100  # per image and class, as COCOeval's last limit; LVIS's counts those of all classes
NONE = -1


class Outcome(IntEnum):
    """What a detection is. Overlap is IoU; `high` is the matching threshold, `low` that of background."""

    CORRECT = 0  # matched a box of its class
    CLASS = 1  # overlap high with a box of another class
    LOCALISATION = 2  # right class, overlap between low and high
    BOTH = 3  # another class, overlap between low and high
    DUPLICATE = 4  # overlap high with a box of its class that a surer detection has
    BACKGROUND = 5  # overlap low with every box
    IGNORED = 6  # on a crowd box, or beyond the 100 surest of its image and class: counts neither way


ERRORS = (Outcome.CLASS, Outcome.LOCALISATION, Outcome.BOTH, Outcome.DUPLICATE, Outcome.BACKGROUND)


@dataclass(frozen=True)
class Outcomes:
    """Detections (n) compared with the ground truth (M boxes).

    Attributes:
        images, labels: int64 [n], the place of each detection's image and category in the ground truth.
        kinds: int8 [n], an Outcome each.
        targets: int64 [n], the row of the box that the detection matched, or is a wrong answer to (its best
            overlap of the sort that names the error); -1 for background and ignored.
        matched: bool [M], boxes that a correct detection has. Crowd boxes never are.
        missed: bool [M], boxes (crowds aside) that no detection is even a class or localisation error of.
    """

    truth: GroundTruth
    detections: Detections
    images: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int8]
    targets: npt.NDArray[np.int64]
    matched: npt.NDArray[np.bool_]
    missed: npt.NDArray[np.bool_]


def sort_outcomes(
    truth: GroundTruth, detections: Detections, *, high: float = 0.5, low: float = 0.1, masks: bool = False
) -> Outcomes:
    """The outcome of every detection.

    Args:
        truth: the evaluated images and their boxes.
        detections: only on images and of categories of `truth`.
        high: IoU from which a detection matches. low: IoU up to which it is background.
        masks: the IoU is that of the masks, which both have, in place of the boxes'.
    """
    images, labels = truth.places_of(detections)
    kinds = np.full(len(detections), Outcome.IGNORED, np.int8)
    targets = np.full(len(detections), NONE, np.int64)
    matched = np.zeros(truth.num_boxes, bool)
    most = MAX_DETECTIONS if truth.federated is None else MAX_DETECTIONS_OF_LVIS
    order = _surest_first_by_image(images, labels, detections.scores, most)
    box_order = np.argsort(truth.box_images, kind="stable")
    places = np.arange(len(truth.image_ids) + 1)
    row_bounds = np.searchsorted(images[order], places)
    box_bounds = np.searchsorted(truth.box_images[box_order], places)
    found_shapes: Shapes = detections.boxes_xywh.astype(np.float64)
    true_shapes: Shapes = truth.boxes_xywh
    if masks:
        assert detections.masks is not None and truth.masks is not None
        found_shapes, true_shapes = detections.masks, truth.masks
    for i in np.unique(images).tolist():
        rows = order[row_bounds[i] : row_bounds[i + 1]]
        in_image = box_order[box_bounds[i] : box_bounds[i + 1]]
        boxes, crowds = in_image[~truth.crowd[in_image]], in_image[truth.crowd[in_image]]
        overlaps = _overlaps(found_shapes, rows, true_shapes, boxes, crowd=False)
        same_class = labels[rows, None] == truth.box_labels[boxes]
        found = _match(np.where(same_class, overlaps, 0.0), high)
        kind, target = _name_errors(overlaps, same_class, high, low)
        kind = np.where(found >= 0, Outcome.CORRECT, kind)
        target = np.where(found >= 0, found, target)
        covered = _overlaps(found_shapes, rows, true_shapes, crowds, crowd=True) >= high
        covered &= labels[rows, None] == truth.box_labels[crowds]
        on_crowd = covered.any(axis=1) & (found < 0)
        kinds[rows] = np.where(on_crowd, Outcome.IGNORED, kind)
        has_target = (target >= 0) & ~on_crowd
        targets[rows[has_target]] = boxes[target[has_target]]
        matched[boxes[found[found >= 0]]] = True
    answered = np.zeros(truth.num_boxes, bool)
    answered[targets[(kinds == Outcome.CLASS) | (kinds == Outcome.LOCALISATION)]] = True
    missed = ~(matched | answered | truth.crowd)
    return Outcomes(truth, detections, images, labels, kinds, targets, matched, missed)


def _surest_first_by_image(
    images: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], scores: npt.NDArray[np.floating[Any]], most: int
) -> npt.NDArray[np.int64]:
    """Rows ordered by image and falling score, ties as they come, the `most` surest of each image and class."""
    by_class = np.lexsort((-scores, labels, images))
    groups = np.stack([images[by_class], labels[by_class]])
    starts = np.flatnonzero(np.diff(groups, prepend=NONE).any(axis=0))
    ranks = np.arange(len(by_class)) - np.repeat(starts, np.diff(starts, append=len(by_class)))
    kept = np.sort(by_class[ranks < most])
    return kept[np.lexsort((-scores[kept], images[kept]))]


def _overlaps(
    found: Shapes, rows: npt.NDArray[np.int64], truth: Shapes, columns: npt.NDArray[np.int64], *, crowd: bool
) -> npt.NDArray[np.float64]:
    """IoU [D, G] of some of the detections' boxes or masks with some of the truth's; intersection over the found one's
    area for crowds."""
    if not len(rows) or not len(columns):
        return np.zeros((len(rows), len(columns)))
    if isinstance(found, RunLengths) and isinstance(truth, RunLengths):
        return coco_mask.iou(found.take(rows).entries(), truth.take(columns).entries(), [int(crowd)] * len(columns))
    assert isinstance(found, np.ndarray) and isinstance(truth, np.ndarray)
    boxes = np.ascontiguousarray(found[rows]), np.ascontiguousarray(truth[columns])
    return coco_mask.iou(*boxes, [int(crowd)] * len(columns))


def _match(overlaps: npt.NDArray[np.float64], high: float) -> npt.NDArray[np.int64]:
    """COCOeval's matching: rows surest first, each takes its best free column of IoU `high` or more."""
    found = np.full(len(overlaps), NONE, np.int64)
    free = overlaps.copy()
    last = overlaps.shape[1] - 1
    for row in np.flatnonzero((overlaps >= high).any(axis=1)):
        column = last - int(np.argmax(free[row, ::-1]))  # of equal overlaps COCOeval takes the last
        if free[row, column] >= high:
            found[row] = column
            free[:, column] = NONE
    return found


def _name_errors(
    overlaps: npt.NDArray[np.float64], same_class: npt.NDArray[np.bool_], high: float, low: float
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64]]:
    """The error each row [D] would be if it matched nothing, and the column it is a wrong answer to."""
    num = len(overlaps)
    if not overlaps.shape[1]:
        return np.full(num, Outcome.BACKGROUND, np.int8), np.full(num, NONE, np.int64)
    same, other = np.where(same_class, overlaps, 0.0), np.where(same_class, 0.0, overlaps)
    best_same, best_other, best = same.max(axis=1), other.max(axis=1), overlaps.max(axis=1)
    tests = [
        (low <= best_same) & (best_same < high),
        best_other >= high,
        best_same >= high,
        best <= low,
    ]
    kinds = np.select(
        tests,
        [Outcome.LOCALISATION, Outcome.CLASS, Outcome.DUPLICATE, Outcome.BACKGROUND],
        Outcome.BOTH,
    )
    targets = np.select(
        tests,
        [same.argmax(axis=1), other.argmax(axis=1), same.argmax(axis=1), np.full(num, NONE)],
        overlaps.argmax(axis=1),
    )
    return kinds.astype(np.int8), targets
