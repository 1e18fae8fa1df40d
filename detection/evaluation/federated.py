"""What counts in LVIS's evaluation: an image is judged for the classes that it was searched for, and no others.

Equal to lvis 0.5.3, LVISResults and LVISEval, to the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data.coco.federated import FREQUENCIES as FREQUENCIES
from detection.evaluation.ground_truth import GroundTruth
from detection.evaluation.results import Detections

MAX_DETECTIONS = 300
"""LVIS's limit on the detections of an image, of all classes together"""


def surest_of_images(detections: Detections, most: int = MAX_DETECTIONS) -> Detections:
    """The `most` surest detections of each image; of equal scores the first ones."""
    order = np.lexsort((-detections.scores, detections.image_ids))
    images = detections.image_ids[order]
    ranks = np.arange(len(order)) - np.searchsorted(images, images)
    if not len(order) or ranks.max() < most:
        return detections
    return detections.take(np.sort(order[ranks < most]))


def judged(
    truth: GroundTruth, detections: Detections, areas: npt.NDArray[np.float64]
) -> tuple[GroundTruth, Detections, npt.NDArray[np.bool_]]:
    """The boxes and detections that count, and which detections are no error where no box answers to them.

    A detection counts where the image has a box of its class, or was searched for it in vain. One of a class that is
    not annotated exhaustively in the image is no false positive. Boxes and detections without area are left out; there
    are no crowds.

    Args:
        truth: of a federated set. detections: on its images and of its categories.
        areas: float64 [n], square pixels of the detections.

    Returns:
        boxes, m detections, and bool [m].
    """
    federated = truth.federated
    assert federated is not None
    num_classes = len(truth.category_ids)
    truth = replace(truth.with_boxes(truth.areas > 0), crowd=np.zeros(int((truth.areas > 0).sum()), dtype=bool))
    images, labels = truth.places_of(detections)
    found = images * num_classes + labels

    def keys(pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        known = np.isin(pairs[:, 0], truth.image_ids) & np.isin(pairs[:, 1], truth.category_ids)
        places = np.searchsorted(truth.image_ids, pairs[known, 0])
        return places * num_classes + np.searchsorted(truth.category_ids, pairs[known, 1])

    searched = np.concatenate([truth.box_images * num_classes + truth.box_labels, keys(federated.negative)])
    counts = np.isin(found, searched) & (areas > 0)
    return truth, detections.take(counts), np.isin(found[counts], keys(federated.not_exhaustive))


def frequencies(truth: GroundTruth) -> npt.NDArray[np.int64]:
    """Of each class its place in FREQUENCIES, int64 [K]; -1 where the file has none."""
    federated: Any = truth.federated
    of_class = np.full(len(truth.category_ids), -1)
    known = np.isin(federated.frequencies[:, 0], truth.category_ids)
    ids, places = federated.frequencies[known].T
    of_class[np.searchsorted(truth.category_ids, ids)] = places
    return of_class
