"""COCO's box metrics over exactly the images that were evaluated."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from detection.evaluation.backends import Accumulated, accumulate, resolve_backend
from detection.evaluation.errors import EvaluationError
from detection.evaluation.ground_truth import GroundTruth, read_ground_truth
from detection.evaluation.precision_recall import Curve, precision_recall_curves
from detection.evaluation.results import Detections, read_results

# COCOeval's twelve figures, in its order.
METRIC_NAMES = (
    "mAP",
    "mAP_50",
    "mAP_75",
    "mAP_s",
    "mAP_m",
    "mAP_l",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_s",
    "AR_m",
    "AR_l",
)
# COCOeval's size classes by area in square pixels; both ends belong to the class.
SIZE_CLASSES = (
    ("s", "small (up to 32 x 32 pixels)", 0.0, 32.0**2),
    ("m", "medium (32 x 32 to 96 x 96 pixels)", 32.0**2, 96.0**2),
    ("l", "large (96 x 96 pixels and more)", 96.0**2, 1e10),
)
MAX_NAMES_IN_NOTE = 10


class CocoEvaluator:
    """Evaluates any number of times against one annotation file, which is read once.

    Attributes:
        truth: the file's boxes as arrays.
        backend: the backend in use, "auto" resolved.
        curves: precision over recall of the last evaluation, see precision_recall_curves; empty before the first.
    """

    def __init__(self, annotation_file: str | os.PathLike[str], *, backend: str = "auto") -> None:
        """Reads the file.

        Args:
            annotation_file: COCO annotations; custom files may lack `area` and `iscrowd`.
            backend: "auto" (hotcoco where installed, else pycocotools), "pycocotools", "hotcoco", or "both",
                which runs the two and raises if they differ.

        Raises:
            EvaluationError: the file cannot be used, or the backend is unknown or not installed.
        """
        self.backend = resolve_backend(backend)
        self.truth = read_ground_truth(annotation_file)
        self.curves: dict[str, Curve] = {}

    @property
    def has_boxes(self) -> bool:
        """Whether the file holds any box; without, there is nothing to evaluate against."""
        return self.truth.num_boxes > 0

    def evaluate(self, detections: Detections, image_ids: Iterable[int] | None = None) -> dict[str, Any]:
        """COCO's metrics of `detections` over exactly the images `image_ids`.

        Args:
            detections: of these images only; none at all is fine.
            image_ids: the evaluated images, each once, in any order; None: every image of the file.

        Returns:
            {"mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l", "AR_1", "AR_10", "AR_100", "AR_s", "AR_m",
            "AR_l": floats in 0..1, or -1 where no box counts; "per_class": {class name: AP over IoU
            0.50:0.95, or -1}; "notes": list of sentences that explain each -1 and whatever else a reader of
            the figures should know}.

        Raises:
            EvaluationError: the file has no boxes; an image is given twice or unknown; a detection lies on
                an image that is not given.
            ResultsError: a detection that is not finite.
        """
        if not self.has_boxes:
            raise EvaluationError(
                f"{self.truth.source} holds no boxes, so there is nothing to evaluate against. Write the"
                " detections as a results file instead (for an evaluation server), or give annotations with"
                " boxes."
            )
        truth = self.truth.restricted_to(self._checked_image_ids(image_ids))
        detections.check_finite()
        _check_images(truth, detections)
        notes = list(truth.notes)
        known = np.isin(detections.category_ids, truth.category_ids)
        if not known.all():
            unknown = np.unique(detections.category_ids[~known]).tolist()
            notes.append(
                f"{int((~known).sum())} detections have category ids that the annotation file lacks"
                f" ({_listed(unknown)}): they count for nothing"
            )
            detections = detections.take(known)
        accumulated = accumulate(self.backend, truth, detections)
        metrics: dict[str, Any] = dict(zip(METRIC_NAMES, accumulated.stats.tolist(), strict=True))
        metrics["per_class"] = dict(zip(truth.class_names, per_class_ap(accumulated), strict=True))
        metrics["notes"] = notes + _explanations(truth, detections)
        self.curves = precision_recall_curves(accumulated, truth.class_names)
        return metrics

    def _checked_image_ids(self, image_ids: Iterable[int] | None) -> npt.NDArray[np.int64]:
        if image_ids is None:
            return self.truth.image_ids
        given = np.array(list(image_ids), dtype=np.int64)
        unique, counts = np.unique(given, return_counts=True)
        if len(unique) != len(given):
            raise EvaluationError(
                f"{int((counts > 1).sum())} images were evaluated more than once"
                f" (ids {_listed(unique[counts > 1])}): each image must come exactly once,"
                " or its detections count double"
            )
        unknown = unique[~np.isin(unique, self.truth.image_ids)]
        if len(unknown):
            raise EvaluationError(
                f"{len(unknown)} evaluated images are not in {self.truth.source} (ids {_listed(unknown)});"
                " evaluate against the annotations that the images were loaded from"
            )
        return unique


def evaluate(
    annotation_file: str | os.PathLike[str],
    detections: Detections,
    *,
    image_ids: Iterable[int] | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """One evaluation of detections in memory; see CocoEvaluator for arguments, result and errors."""
    return CocoEvaluator(annotation_file, backend=backend).evaluate(detections, image_ids)


def evaluate_results(
    annotation_file: str | os.PathLike[str], results_file: str | os.PathLike[str], backend: str = "auto"
) -> dict[str, Any]:
    """Evaluates a COCO results file, ours or another program's, over all images of the annotation file.

    See CocoEvaluator for result and errors; ResultsError names the entry of the results file that cannot be
    read.
    """
    evaluator = CocoEvaluator(annotation_file, backend=backend)
    return evaluator.evaluate(read_results(results_file))


def per_class_ap(accumulated: Accumulated) -> list[float]:
    """AP of each category: mean precision over IoUs and recall points, all sizes, 100 detections; or -1."""
    precision = accumulated.precision[:, :, :, 0, 2]
    counted = precision[0, 0] > -1  # a category has boxes that count, or none at any threshold
    means = precision.mean(axis=(0, 1))
    return np.where(counted, means, -1.0).tolist()


def _check_images(truth: GroundTruth, detections: Detections) -> None:
    outside = ~np.isin(detections.image_ids, truth.image_ids)
    if outside.any():
        ids = np.unique(detections.image_ids[outside])
        raise EvaluationError(
            f"{int(outside.sum())} detections are on {len(ids)} images that are not among the"
            f" {len(truth.image_ids)} evaluated images of {truth.source} (ids {_listed(ids)}):"
            " results and annotations belong to different image sets"
        )


def _explanations(truth: GroundTruth, detections: Detections) -> list[str]:
    """Why figures are -1, or 0 all over."""
    notes = []
    counted = ~truth.crowd
    num_images = len(truth.image_ids)
    if not counted.any():
        what = "only crowd boxes" if len(counted) else "no boxes"
        return [f"no figure is defined (-1 in files): the {num_images} evaluated images hold {what}"]
    if not len(detections):
        notes.append("no detections at all: every figure is 0 where there are boxes to find")
    for suffix, words, low, high in SIZE_CLASSES:
        if not (counted & (truth.areas >= low) & (truth.areas <= high)).any():
            notes.append(f"mAP_{suffix} is not defined (-1 in files): the evaluated images hold no {words} object")
    with_boxes = set(truth.box_category_ids[counted].tolist())
    absent = [
        name
        for name, number in zip(truth.class_names, truth.category_ids.tolist(), strict=True)
        if number not in with_boxes
    ]
    if len(absent) == 1:
        notes.append(
            f"AP of class '{absent[0]}' is not defined (-1 in files): the evaluated images hold none, crowds aside"
        )
    elif absent:
        notes.append(
            f"AP of {len(absent)} classes is not defined (-1 in files), the evaluated images hold none, crowds aside:"
            f" {_listed(absent)}"
        )
    return notes


def _listed(values: Iterable[Any]) -> str:
    texts = [str(v) for v in values]
    shown = ", ".join(texts[:MAX_NAMES_IN_NOTE])
    return shown if len(texts) <= MAX_NAMES_IN_NOTE else f"{shown} and {len(texts) - MAX_NAMES_IN_NOTE} more"
