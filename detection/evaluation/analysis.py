"""Metrics that explain: per class, by score, by kind of error, by confused classes, by image."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from data.coco.annotations import read_coco
from data.coco.run_lengths import RunLengths
from detection.evaluation.backends import Accumulated
from detection.evaluation.coco_metrics import IOU_50, IOU_75, CocoEvaluator, per_class_ap
from detection.evaluation.error_types import ERRORS, Outcome, Outcomes, sort_outcomes
from detection.evaluation.federated import judged, surest_of_images
from detection.evaluation.ground_truth import GroundTruth
from detection.evaluation.results import Detections, read_results

RECALL_POINTS = np.linspace(0.0, 1.0, 101)  # COCOeval's recThrs
SIZES = ("s", "m", "l")
CURVES = ("iou_50", "iou_75", "iou_50_95")
DIGITS = 5


def analyze_results(
    annotation_file: str | os.PathLike[str],
    results_file: str | os.PathLike[str],
    *,
    backend: str = "auto",
    score_threshold: float | None = None,
    num_worst_images: int = 24,
    num_best_images: int = 6,
    num_run: int | None = None,
) -> dict[str, Any]:
    """Everything about a COCO results file, ours or another program's, in plain types that JSON takes.

    Args:
        score_threshold: detections from this score on are what the confusion matrix and the list of worst
            images look at; None: each class has the threshold at which its own F1 is best (classes that have no
            boxes or no detections: the median of the others).
        num_worst_images, num_best_images: lengths of the lists of worst and of best images.
        num_run: on how many of the images the detector was run; None: not known. A note counts the others.

    Returns:
        {"metrics": as CocoEvaluator.evaluate,
         "classes": a list of {"name", "category_id", "num_boxes", "num_detections", "AP", "AP_50", "AP_75",
            "AP_s", "AP_m", "AP_l", "AR_100" (-1 where undefined), "best_f1", "best_f1_threshold", "precision"
            and "recall" at that threshold (IoU 0.5; None where the class has no boxes or no detections),
            "errors": counts},
         "precision_recall": {"recall": 101 points, "mean": {"iou_50", "iou_75", "iou_50_95": 101 precisions
            over the classes that have boxes}, "per_class": {name: the same}},
         "errors": {"AP_50", "counts", "AP_50_gain": what AP_50 would gain if all errors of a kind were
         mended;
            kinds are class, localisation, both, duplicate, background, missed},
         "confusion_matrix": {"labels": class names and "background" last, "matrix": rows truth, columns
         found}, "worst_images", "best_images": lists of {"image_id", "file_name", "correct", "wrong", "missed",
         "f1", "boxes":
            [{"box_xywh", "kind": "correct", "missed" or an error, "name", "score", "truth"}]}; the worst have an
            error, the best a correct detection}
        Of a results file of masks all but "metrics" (which has boxes and masks) is about masks: IoU is that of masks,
        and each of "boxes" has its mask too, as "segmentation", COCO's run lengths.

    Raises:
        AnnotationError, EvaluationError, ResultsError: as CocoEvaluator and read_results.
    """
    detections = read_results(results_file)
    has_masks = detections.masks is not None
    evaluator = CocoEvaluator(read_coco(os.fspath(annotation_file), masks=has_masks), backend=backend)
    metrics = evaluator.evaluate(detections)
    truth, accumulated = evaluator.truth, evaluator.accumulated_masks if has_masks else evaluator.accumulated
    assert accumulated is not None
    num_images, num_empty = len(truth.image_ids), len(np.setdiff1d(truth.image_ids, detections.image_ids))
    if num_run is not None and num_run < num_images:
        metrics["notes"].append(
            f"{num_images - num_run:,} of {num_images:,} images have no detections because they were not run: every "
            "box in them counts as missed"
        )
    elif num_empty and num_run is None:
        metrics["notes"].append(
            f"{num_empty:,} of {num_images:,} images have no detections; where they were not run "
            "(--limit-val-batches), their boxes count as missed all the same"
        )
    if truth.federated is not None:
        detections = surest_of_images(detections)
    detections = detections.take(np.isin(detections.category_ids, truth.category_ids))
    lenient = None
    if truth.federated is not None:
        metrics["notes"].append("LVIS's rules: AR_100 of a class is its recall with 300 detections an image")
        sides = detections.boxes_xywh[:, 2:]
        areas = sides[:, 0] * sides[:, 1] if detections.masks is None else detections.masks.areas()
        truth, detections, lenient = judged(truth, detections, areas)
    outcomes = sort_outcomes(truth, detections, masks=has_masks)
    if lenient is not None:
        outcomes.kinds[lenient & (outcomes.kinds != Outcome.CORRECT)] = Outcome.IGNORED
    num_boxes = _count(truth, ~truth.crowd)
    correct, scores, bounds = _ranked(detections, outcomes.kinds, outcomes.labels, len(num_boxes))
    classes = [slice(*bounds[k : k + 2]) for k in range(len(num_boxes))]
    operating = [best_f1(scores[rows], correct[rows], int(num_boxes[k])) for k, rows in enumerate(classes)]
    shown = detections.scores >= _thresholds(operating, score_threshold)[outcomes.labels]
    shown &= outcomes.kinds != Outcome.IGNORED
    return {
        "metrics": metrics,
        "classes": _class_rows(outcomes, accumulated, operating),
        "precision_recall": _curves(truth, accumulated),
        "errors": error_split(outcomes),
        "confusion_matrix": {
            "labels": [*truth.class_names, "background"],
            "matrix": confusion_matrix(outcomes, shown).tolist(),
        },
        **_extreme_images(outcomes, shown, num_worst_images, num_best_images),
    }


def _thresholds(operating: list[dict[str, float] | None], given: float | None) -> npt.NDArray[np.float64]:
    """Each class's score threshold, float64 [K]: the given one, or its own, or the median of those that have one."""
    own = np.array([np.nan if point is None else point["threshold"] for point in operating])
    if given is not None:
        return np.full(len(own), given)
    return np.where(np.isnan(own), 0.0 if np.isnan(own).all() else np.nanmedian(own), own)


def average_precision(scores: npt.NDArray[np.floating[Any]], correct: npt.NDArray[np.bool_], num_boxes: int) -> float:
    """COCOeval's AP at one IoU threshold: the mean of 101 interpolated precisions.

    Args:
        scores: [n], ranked surest first, ties in the order they are to keep. correct: bool [n].
        num_boxes: how many there were to find, more than 0.
    """
    if not len(scores):
        return 0.0
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(scores) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / num_boxes, RECALL_POINTS, side="left")
    return float(np.append(envelope, 0.0)[np.minimum(places, len(envelope))].mean())


def best_f1(
    scores: npt.NDArray[np.floating[Any]], correct: npt.NDArray[np.bool_], num_boxes: int
) -> dict[str, float] | None:
    """The score threshold (detections at it are kept) whose F1 = 2 correct / (kept + boxes) is highest.

    Args as `average_precision`, num_boxes may be 0. Returns {"f1", "threshold", "precision", "recall"}; of
    equal F1 the highest threshold; None without boxes or detections.
    """
    if not num_boxes or not len(scores):
        return None
    cuts = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # a threshold cannot part a tie
    hits = np.cumsum(correct)[cuts]
    kept = cuts + 1
    f1 = 2 * hits / (kept + num_boxes)
    best = int(f1.argmax())
    return {
        "f1": float(f1[best]),
        "threshold": float(scores[cuts[best]]),
        "precision": float(hits[best] / kept[best]),
        "recall": float(hits[best] / num_boxes),
    }


def error_split(outcomes: Outcomes) -> dict[str, Any]:
    """How many errors there are of each kind, and what AP_50 would gain without them, as TIDE defines it.

    Mending a class or localisation error makes the surest detection of each unmatched box correct and
    removes the others; both, duplicate and background errors are removed; missed boxes are no longer asked
    for. A gain below 0, which interpolation can give, counts as 0.
    """
    truth, detections = outcomes.truth, outcomes.detections
    num_boxes = _count(truth, ~truth.crowd)
    base = _mean_ap(detections, outcomes.labels, outcomes.kinds, num_boxes)
    counts: dict[str, int] = {}
    gains: dict[str, float] = {}
    surest_answers = _surest_answers(outcomes)
    for error in ERRORS:
        is_error = outcomes.kinds == error
        mended = surest_answers[is_error[surest_answers]]
        kinds, labels = np.where(is_error, Outcome.IGNORED, outcomes.kinds), outcomes.labels.copy()
        kinds[mended] = Outcome.CORRECT
        labels[mended] = truth.box_labels[outcomes.targets[mended]]
        counts[error.name.lower()] = int(is_error.sum())
        gains[error.name.lower()] = _mean_ap(detections, labels, kinds, num_boxes) - base
    counts["missed"] = int(outcomes.missed.sum())
    asked = num_boxes - _count(truth, outcomes.missed)
    gains["missed"] = _mean_ap(detections, outcomes.labels, outcomes.kinds, asked, num_boxes) - base
    return {"AP_50": base, "counts": counts, "AP_50_gain": {kind: max(0.0, gain) for kind, gain in gains.items()}}


def confusion_matrix(outcomes: Outcomes, shown: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """int64 [K + 1, K + 1]: boxes of class (row) found as class (column); the last row and column are
    background.

    Of the `shown` detections (bool [n]) the correct ones count first. A class error then takes the box it
    answers to, surest first, if that is still free. What is left is background found as something, or a box
    found as background, that is missed. Detections on crowds are in no cell.
    """
    truth, labels = outcomes.truth, outcomes.labels
    num_classes = len(truth.category_ids)
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    free = ~truth.crowd
    correct = np.flatnonzero(shown & (outcomes.kinds == Outcome.CORRECT))
    np.add.at(matrix, (labels[correct], labels[correct]), 1)
    free[outcomes.targets[correct]] = False
    wrong = np.flatnonzero(shown & (outcomes.kinds != Outcome.CORRECT) & (outcomes.kinds != Outcome.IGNORED))
    for row in wrong[np.argsort(-outcomes.detections.scores[wrong], kind="stable")].tolist():
        box = outcomes.targets[row]
        if outcomes.kinds[row] == Outcome.CLASS and free[box]:
            free[box] = False
            matrix[truth.box_labels[box], labels[row]] += 1
        else:
            matrix[num_classes, labels[row]] += 1
    matrix[:num_classes, num_classes] = _count(truth, free)
    return matrix


def _surest_answers(outcomes: Outcomes) -> npt.NDArray[np.int64]:
    """For each unmatched box that class or localisation errors answer to, the row of the surest of them."""
    rows = np.flatnonzero((outcomes.kinds == Outcome.CLASS) | (outcomes.kinds == Outcome.LOCALISATION))
    rows = rows[~outcomes.matched[outcomes.targets[rows]]]
    rows = rows[np.argsort(-outcomes.detections.scores[rows], kind="stable")]
    return rows[np.unique(outcomes.targets[rows], return_index=True)[1]]


def _count(truth: GroundTruth, which: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return np.bincount(truth.box_labels[which], minlength=len(truth.category_ids))


def _ranked(
    detections: Detections, kinds: npt.NDArray[Any], labels: npt.NDArray[np.int64], num_classes: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.floating[Any]], list[int]]:
    """Which detections are correct, and their scores: class by class, surest first, ties by image id, then as they
    come (COCOeval's order), the ignored ones left out. And where each class begins, with the end."""
    rows = np.flatnonzero(kinds != Outcome.IGNORED)
    rows = rows[np.lexsort((detections.image_ids[rows], -detections.scores[rows], labels[rows]))]
    bounds = np.searchsorted(labels[rows], np.arange(num_classes + 1)).tolist()
    return kinds[rows] == Outcome.CORRECT, detections.scores[rows], bounds


def _mean_ap(
    detections: Detections,
    labels: npt.NDArray[np.int64],
    kinds: npt.NDArray[Any],
    num_boxes: npt.NDArray[np.int64],
    averaged_over: npt.NDArray[np.int64] | None = None,
) -> float:
    """Mean AP over the classes that have boxes; one whose boxes were all taken out has AP 0."""
    correct, scores, bounds = _ranked(detections, kinds, labels, len(num_boxes))
    values = []
    for k in np.flatnonzero(num_boxes if averaged_over is None else averaged_over).tolist():
        rows, boxes = slice(*bounds[k : k + 2]), int(num_boxes[k])
        values.append(average_precision(scores[rows], correct[rows], boxes) if boxes else 0.0)
    return float(np.mean(values)) if values else -1.0


def _class_rows(
    outcomes: Outcomes, accumulated: Accumulated, operating: list[dict[str, float] | None]
) -> list[dict[str, Any]]:
    truth, precision, recall = outcomes.truth, accumulated.precision, accumulated.recall
    ap = per_class_ap(accumulated)
    num_boxes, num_missed = _count(truth, ~truth.crowd), _count(truth, outcomes.missed)
    rows = []
    for k, (name, category) in enumerate(zip(truth.class_names, truth.category_ids.tolist(), strict=True)):
        kinds = outcomes.kinds[outcomes.labels == k]
        point = operating[k] or dict.fromkeys(("f1", "threshold", "precision", "recall"))
        errors = {error.name.lower(): int((kinds == error).sum()) for error in ERRORS}
        counts = {"num_boxes": int(num_boxes[k]), "num_detections": len(kinds)}
        rows.append(
            {
                **{"name": name, "category_id": category, **counts, "AP": ap[k]},
                "AP_50": float(precision[IOU_50, :, k, 0, -1].mean()),
                "AP_75": float(precision[IOU_75, :, k, 0, -1].mean()),
                **{f"AP_{size}": float(precision[:, :, k, 1 + i, -1].mean()) for i, size in enumerate(SIZES)},
                "AR_100": float(recall[:, k, 0, -1].mean()),
                **{"best_f1": point["f1"], "best_f1_threshold": point["threshold"]},
                **{"precision": point["precision"], "recall": point["recall"]},
                "errors": errors | {"missed": int(num_missed[k])},
            }
        )
    return rows


def _curves(truth: GroundTruth, accumulated: Accumulated) -> dict[str, Any]:
    precision = accumulated.precision[:, :, :, 0, -1]
    curves = np.stack([precision[IOU_50], precision[IOU_75], precision.mean(axis=0)])  # [3, 101, K]
    defined = np.flatnonzero(curves[0, 0] > -1)

    def named(values: npt.NDArray[np.float64]) -> dict[str, list[float]]:
        return dict(zip(CURVES, values.round(DIGITS).tolist(), strict=True))

    return {
        "recall": RECALL_POINTS.round(2).tolist(),
        "mean": named(curves[:, :, defined].mean(axis=2)) if len(defined) else {},
        "per_class": {truth.class_names[k]: named(curves[:, :, k]) for k in defined.tolist()},
    }


def _extreme_images(
    outcomes: Outcomes, shown: npt.NDArray[np.bool_], num_worst: int, num_best: int
) -> dict[str, list[dict[str, Any]]]:
    """The images with the most errors, and of the others those with the fewest that have a correct detection."""
    truth, correct = outcomes.truth, shown & (outcomes.kinds == Outcome.CORRECT)
    found = np.zeros(truth.num_boxes, bool)
    found[outcomes.targets[correct]] = True
    lost = ~found & ~truth.crowd
    size = len(truth.image_ids)
    places, box_places = outcomes.images, truth.box_images
    num_correct = np.bincount(places[correct], minlength=size)
    num_wrong = np.bincount(places[shown & ~correct], minlength=size)
    num_lost = np.bincount(box_places[lost], minlength=size)
    num_errors = num_wrong + num_lost

    def described(i: int) -> dict[str, Any]:
        return {
            "image_id": int(truth.image_ids[i]),
            "file_name": truth.file_names[i],
            "correct": int(num_correct[i]),
            "wrong": int(num_wrong[i]),
            "missed": int(num_lost[i]),
            "f1": float(2 * num_correct[i] / (2 * num_correct[i] + num_errors[i])),
            "boxes": _boxes_of_image(outcomes, shown & (places == i), lost & (box_places == i)),
        }

    worst = np.argsort(-num_errors, kind="stable")[:num_worst]
    worst = worst[num_errors[worst] > 0]
    best = np.lexsort((-num_correct, num_errors))
    best = best[(num_correct[best] > 0) & ~np.isin(best, worst)][:num_best]
    return {
        "worst_images": [described(i) for i in worst.tolist()],
        "best_images": [described(i) for i in best.tolist()],
    }


def _boxes_of_image(
    outcomes: Outcomes, shown: npt.NDArray[np.bool_], lost: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    truth, detections = outcomes.truth, outcomes.detections
    names = truth.class_names
    boxes: list[dict[str, Any]] = []
    for row in np.flatnonzero(lost).tolist():
        name = names[truth.box_labels[row]]
        box = truth.boxes_xywh[row].round(2).tolist()
        shape = _mask(truth.masks if detections.masks is not None else None, row)
        boxes.append({"box_xywh": box, "kind": "missed", "name": name, "score": None, "truth": name, **shape})
    for row in np.flatnonzero(shown).tolist():
        target = int(outcomes.targets[row])
        boxes.append(
            {
                "box_xywh": detections.boxes_xywh[row].round(2).tolist(),
                "kind": Outcome(int(outcomes.kinds[row])).name.lower(),
                "name": names[outcomes.labels[row]],
                "score": round(float(detections.scores[row]), 4),
                "truth": names[truth.box_labels[target]] if target >= 0 else None,
                **_mask(detections.masks, row),
            }
        )
    return boxes


def _mask(masks: RunLengths | None, row: int) -> dict[str, Any]:
    if masks is None:
        return {}
    return {"segmentation": {"size": masks.sizes[row].tolist(), "counts": masks.counts(row).decode("ascii")}}
