"""COCO's metrics of boxes and masks over exactly the images that were evaluated."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from data.coco.annotations import CocoAnnotations, read_coco
from data.coco.findings import examples
from detection.evaluation.backends import Accumulated, accumulate, resolve_backend
from detection.evaluation.federated import FREQUENCIES, MAX_DETECTIONS, frequencies, surest_of_images
from detection.evaluation.ground_truth import GroundTruth
from detection.evaluation.results import Detections, EvaluationError, read_results
from detection.evaluation.voc_metrics import VOC, voc_metrics

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

# COCOeval's twelve figures, in its order.
METRIC_NAMES = (
    *("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"),
    *("AR_1", "AR_10", "AR_100", "AR_s", "AR_m", "AR_l"),
)
# LVIS's thirteen, in its order: AP of rare, common and frequent classes besides.
LVIS_METRIC_NAMES = (*METRIC_NAMES[:6], "mAP_r", "mAP_c", "mAP_f", f"AR_{MAX_DETECTIONS}", *METRIC_NAMES[9:])
SEGM = "segm_"
"""What the names of the figures of masks begin with"""
# COCOeval's size classes by area in square pixels; both ends belong to the class.
SIZE_CLASSES = (
    ("s", "small (up to 32 x 32 pixels)", 0.0, 32.0**2),
    ("m", "medium (32 x 32 to 96 x 96 pixels)", 32.0**2, 96.0**2),
    ("l", "large (96 x 96 pixels and more)", 96.0**2, 1e10),
)
IOU_50, IOU_75 = 0, 5
"""Places among COCOeval's IoU thresholds 0.50:0.05:0.95"""
MAX_NAMES_IN_NOTE = 10


class CocoEvaluator:
    """Evaluates any number of times against one set of annotations.

    Attributes:
        truth: its boxes as arrays.
        backend: the backend in use, "auto" resolved.
        accumulated: precision and recall of the last evaluation; None before the first.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str] | CocoAnnotations,
        *,
        backend: str = "auto",
        voc_metric: str | None = None,
    ) -> None:
        """
        Args:
            annotations: a COCO annotation file, or what data.read_coco has read of one; custom files may lack
                `area` and `iscrowd`.
            backend: "auto" (hotcoco where installed, else pycocotools), "pycocotools", "hotcoco", or "both",
                which runs the two and raises if they differ.
            voc_metric: "11points" or "area": Pascal VOC's figures besides, see voc_metrics.

        Raises:
            AnnotationError: the file cannot be used; see data.read_coco.
            EvaluationError: the backend is unknown or not installed.
        """
        self.backend = resolve_backend(backend)
        self.voc_metric = voc_metric
        if not isinstance(annotations, CocoAnnotations):
            annotations = read_coco(os.fspath(annotations))
        self.truth = GroundTruth.of(annotations)
        self.accumulated: Accumulated | None = None
        self.accumulated_masks: Accumulated | None = None

    @property
    def has_boxes(self) -> bool:
        """Whether the file holds any box; without, there is nothing to evaluate against."""
        return self.truth.num_boxes > 0

    @property
    def curves(self) -> dict[str, Curve]:
        """Name -> (precision, recall) of the last evaluation, float64 [101] each, the recall falling from 1 to 0.

        "all/IoU 0.50" and "all/IoU 0.75" are means over the classes that have boxes, "class/<name>" is one class at
        IoU 0.50; all sizes, 100 detections an image. Precision is COCO's: at each recall the highest that is reached
        at this recall or beyond, 0 where no detection reaches it. A class without boxes has no curve; before the
        first evaluation there is none.
        """
        if self.accumulated is None:
            return {}
        precision = self.accumulated.precision[:, ::-1, :, 0, -1]
        recall = np.linspace(1, 0, precision.shape[1])
        counted = np.flatnonzero(precision[0, 0] > -1)
        if not len(counted):
            return {}
        means = {"all/IoU 0.50": IOU_50, "all/IoU 0.75": IOU_75}
        curves = {name: (precision[place][:, counted].mean(axis=1), recall) for name, place in means.items()}
        names = self.truth.class_names
        return curves | {f"class/{names[k]}": (precision[IOU_50][:, k], recall) for k in counted.tolist()}

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

            Of an LVIS file LVIS's figures, by its rules: "mAP_r", "mAP_c" and "mAP_f" of rare, common and frequent
            classes, and "AR_300" in place of the recalls of fewer detections.

            With masks, of detections and annotations, the same figures of masks besides: "segm_mAP", ...,
            "segm_per_class".

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
        outside = ~np.isin(detections.image_ids, truth.image_ids)
        if outside.any():
            ids = np.unique(detections.image_ids[outside])
            raise EvaluationError(
                f"{int(outside.sum())} detections are on {len(ids)} images that are not among the"
                f" {len(truth.image_ids)} evaluated images of {truth.source} (ids {_listed(ids)}):"
                " results and annotations belong to different image sets"
            )
        notes = list(truth.notes)
        if truth.federated is not None:
            detections = surest_of_images(detections)
        known = np.isin(detections.category_ids, truth.category_ids)
        if not known.all():
            notes.append(
                f"{int((~known).sum())} detections have category ids that the annotation file lacks"
                f" ({_listed(np.unique(detections.category_ids[~known]))}): they count for nothing"
            )
            detections = detections.take(known)
        self.accumulated = accumulate(self.backend, truth, detections)
        metrics: dict[str, Any] = dict(figures_of(self.accumulated, truth))
        metrics["per_class"] = dict(zip(truth.class_names, per_class_ap(self.accumulated), strict=True))
        if detections.masks is not None and truth.masks is not None:
            _check_sizes(truth, detections)
            of_masks = self.accumulated_masks = accumulate(self.backend, truth, detections, masks=True)
            metrics |= {SEGM + name: value for name, value in figures_of(of_masks, truth).items()}
            metrics[f"{SEGM}per_class"] = dict(zip(truth.class_names, per_class_ap(of_masks), strict=True))
        if self.voc_metric is not None:
            metrics |= voc_metrics(truth, detections, self.voc_metric)
        metrics["notes"] = notes + _explanations(truth, detections)
        return metrics

    def _checked_image_ids(self, image_ids: Iterable[int] | None) -> npt.NDArray[np.int64]:
        if image_ids is None:
            return self.truth.image_ids
        unique, counts = np.unique(np.array(list(image_ids), dtype=np.int64), return_counts=True)
        repeated, unknown = unique[counts > 1], unique[~np.isin(unique, self.truth.image_ids)]
        if len(repeated):
            raise EvaluationError(
                f"{len(repeated)} images were evaluated more than once (ids {_listed(repeated)}):"
                " each image must come exactly once, or its detections count double"
            )
        if len(unknown):
            raise EvaluationError(
                f"{len(unknown)} evaluated images are not in {self.truth.source} (ids {_listed(unknown)});"
                " evaluate against the annotations that the images were loaded from"
            )
        return unique


def _check_sizes(truth: GroundTruth, detections: Detections) -> None:
    """Masks of another size than those of their image have no overlap with any, and nothing would tell."""
    assert truth.masks is not None and detections.masks is not None
    sizes = np.zeros((len(truth.image_ids), 2), np.int64)
    sizes[truth.box_images] = truth.masks.sizes
    expected, found = sizes[truth.places_of(detections)[0]], detections.masks.sizes
    wrong = np.flatnonzero((expected > 0).all(axis=1) & (expected != found).any(axis=1))
    if len(wrong):
        first = wrong[0]
        raise EvaluationError(
            f"{len(wrong)} masks are not of the size of their image, the first on image"
            f" {detections.image_ids[first]}: {found[first, 1]} x {found[first, 0]} pixels, and {truth.source} says"
            f" {expected[first, 1]} x {expected[first, 0]}. Give masks at the size of the images as they are stored."
        )


def evaluate_results(
    annotation_file: str | os.PathLike[str], results_file: str | os.PathLike[str], backend: str = "auto"
) -> dict[str, Any]:
    """Evaluates a COCO results file, ours or another program's, over all images of the annotation file.

    See CocoEvaluator for result and errors; ResultsError names the entry of the results file that cannot be
    read.
    """
    detections = read_results(results_file)
    annotations = read_coco(os.fspath(annotation_file), masks=detections.masks is not None)
    return CocoEvaluator(annotations, backend=backend).evaluate(detections)


def metric_names(annotations: CocoAnnotations, voc_metric: str | None = None) -> tuple[str, ...]:
    """The figures of a validation against these annotations: COCO's, or LVIS's, and VOC's where they are asked for."""
    names = METRIC_NAMES if annotations.federated is None else LVIS_METRIC_NAMES
    return names if voc_metric is None else (*names, f"{VOC}mAP")


def figures_of(accumulated: Accumulated, truth: GroundTruth) -> dict[str, float]:
    """COCOeval's summary, or LVISEval's of a federated set, by name; -1 where no box counts."""
    precision, recall = accumulated.precision, accumulated.recall

    def mean(values: npt.NDArray[np.float64]) -> float:
        defined = values[values > -1]
        return float(np.mean(defined)) if len(defined) else -1.0

    sizes = {f"_{suffix}": place for place, (suffix, *_) in enumerate(SIZE_CLASSES, start=1)}
    found = {
        "mAP": mean(precision[:, :, :, 0, -1]),
        "mAP_50": mean(precision[IOU_50, :, :, 0, -1]),
        "mAP_75": mean(precision[IOU_75, :, :, 0, -1]),
        **{f"mAP{suffix}": mean(precision[:, :, :, place, -1]) for suffix, place in sizes.items()},
    }
    if truth.federated is not None:
        of_class = frequencies(truth)
        found |= {
            f"mAP_{letter}": mean(precision[:, :, of_class == place, 0, -1]) for place, letter in enumerate(FREQUENCIES)
        }
        limits: dict[str, int] = {f"AR_{MAX_DETECTIONS}": -1}
    else:
        limits = {"AR_1": 0, "AR_10": 1, "AR_100": 2}
    found |= {name: mean(recall[:, :, 0, place]) for name, place in limits.items()}
    return found | {f"AR{suffix}": mean(recall[:, :, place, -1]) for suffix, place in sizes.items()}


def per_class_ap(accumulated: Accumulated) -> list[float]:
    """AP of each category: mean precision over IoUs and recall points, all sizes, the most detections; or -1."""
    precision = accumulated.precision[:, :, :, 0, -1]
    counted = precision[0, 0] > -1  # a category has boxes that count, or none at any threshold
    return np.where(counted, precision.mean(axis=(0, 1)), -1.0).tolist()


def _explanations(truth: GroundTruth, detections: Detections) -> list[str]:
    """Why figures are -1, or 0 all over."""
    notes = []
    counted = ~truth.crowd
    if not counted.any():
        what = "only crowd boxes" if len(counted) else "no boxes"
        return [f"no figure is defined (-1 in files): the {len(truth.image_ids)} evaluated images hold {what}"]
    if not len(detections):
        notes.append("no detections at all: every figure is 0 where there are boxes to find")
    for suffix, words, low, high in SIZE_CLASSES:
        if not (counted & (truth.areas >= low) & (truth.areas <= high)).any():
            notes.append(f"mAP_{suffix} is not defined (-1 in files): the evaluated images hold no {words} object")
    with_boxes = set(truth.box_labels[counted].tolist())
    absent = [name for label, name in enumerate(truth.class_names) if label not in with_boxes]
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
    return examples(values, shown=MAX_NAMES_IN_NOTE)
