"""The programs that compute COCO's box metrics: pycocotools, which is the judge, and hotcoco, which is fast.

Both work on the same flat arrays and return the same three arrays; everything reported is derived from these
in one place, so a choice of backend can change the time it takes and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detection.evaluation.errors import EvaluationError
from detection.evaluation.ground_truth import GroundTruth
from detection.evaluation.results import Detections

BACKENDS = ("auto", "pycocotools", "hotcoco", "both")
TOLERANCE = 1e-9  # what "both" lets the backends differ by; they are equal to the last bit where all is well


@dataclass(frozen=True)
class Accumulated:
    """COCOeval's accumulated results: T = 10 IoU thresholds 0.50:0.05:0.95, R = 101 recall points, K
    categories (ascending ids), A = 4 size classes (all, small, medium, large), L = 3 limits on detections
    per image and class (1, 10, 100). -1 stands where no box counts.

    Attributes:
        precision: float64 [T, R, K, A, L].
        recall: float64 [T, K, A, L].
        stats: float64 [12], COCOeval's summary in its order.
    """

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    stats: npt.NDArray[np.float64]


def resolve_backend(name: str) -> str:
    """The backend that `name` means here: "auto" is hotcoco where it is installed, else pycocotools.

    Raises:
        EvaluationError: no such backend, or it is not installed.
    """
    if name not in BACKENDS:
        raise EvaluationError(f"unknown evaluation backend {name!r}; known are {', '.join(BACKENDS)}")
    has_hotcoco = importlib.util.find_spec("hotcoco") is not None
    if name == "auto":
        return "hotcoco" if has_hotcoco else "pycocotools"
    if name in ("hotcoco", "both") and not has_hotcoco:
        raise EvaluationError(
            f"the evaluation backend {name!r} needs the package hotcoco, which is not installed:"
            " `pip install hotcoco`, or choose 'auto' or 'pycocotools'"
        )
    return name


def accumulate(backend: str, truth: GroundTruth, detections: Detections) -> Accumulated:
    """Matches and accumulates with a resolved backend.

    Args:
        truth: exactly the evaluated images and their boxes.
        detections: every one on an image and of a category of `truth`, finite.

    Raises:
        EvaluationError: "both" was asked for and the two differ by more than 1e-9.
    """
    if not len(truth.image_ids):  # an empty list of images means all of them to COCOeval
        return _nothing_evaluated(len(truth.category_ids))
    if backend == "pycocotools":
        return accumulate_with_pycocotools(truth, detections)
    if backend == "hotcoco":
        return accumulate_with_hotcoco(truth, detections)
    assert backend == "both", backend
    judge = accumulate_with_pycocotools(truth, detections)
    other = accumulate_with_hotcoco(truth, detections)
    for field in ("stats", "precision", "recall"):
        expected, found = getattr(judge, field), getattr(other, field)
        difference = float(np.abs(expected - found).max(initial=0.0))
        if difference > TOLERANCE:
            where = tuple(int(i) for i in np.unravel_index(np.abs(expected - found).argmax(), expected.shape))
            raise EvaluationError(
                f"hotcoco and pycocotools disagree on {truth.source}: {field}{list(where)} is"
                f" {found[where]!r} and {expected[where]!r}. Trust pycocotools (backend 'pycocotools'), and"
                " report the case to hotcoco."
            )
    return judge


def accumulate_with_pycocotools(truth: GroundTruth, detections: Detections) -> Accumulated:
    """COCOeval itself, with what it prints thrown away. At least one image."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dataset: dict[str, Any] = {
        "images": [{"id": i} for i in truth.image_ids.tolist()],
        "categories": [{"id": i} for i in truth.category_ids.tolist()],
    }
    boxes = zip(
        truth.box_image_ids.tolist(),
        truth.box_category_ids.tolist(),
        truth.boxes_xywh.tolist(),
        truth.areas.tolist(),
        truth.crowd.tolist(),
        strict=True,
    )
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    truths = [
        dict(zip(keys, (number, image, category, box, area, int(crowd)), strict=True))
        for number, (image, category, box, area, crowd) in enumerate(boxes, start=1)
    ]
    boxes_xywh = detections.boxes_xywh.astype(np.float64)
    rows = zip(
        detections.image_ids.tolist(),
        detections.category_ids.tolist(),
        boxes_xywh.tolist(),
        (boxes_xywh[:, 2] * boxes_xywh[:, 3]).tolist(),
        detections.scores.astype(np.float64).tolist(),
        strict=True,
    )
    results = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "score": score}
        for number, (image, category, box, area, score) in enumerate(rows, start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for annotations in (truths, results):
            side = COCO()
            side.dataset = {**dataset, "annotations": annotations}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return Accumulated(
        evaluation.eval["precision"],
        evaluation.eval["recall"],
        np.asarray(evaluation.stats, dtype=np.float64),
    )


def accumulate_with_hotcoco(truth: GroundTruth, detections: Detections) -> Accumulated:
    """hotcoco's COCOeval, fed arrays. At least one image."""
    import hotcoco

    # hotcoco takes detections as one float array: places in the ascending order stand for ids, which may be
    # too large for a float to hold. The order, which decides ties between images, stays.
    images = [{"id": i} for i in range(1, len(truth.image_ids) + 1)]
    categories = [{"id": i, "name": name} for i, name in enumerate(truth.class_names, start=1)]
    annotated = hotcoco.COCO.from_arrays(
        images,
        categories,
        np.searchsorted(truth.image_ids, truth.box_image_ids) + 1,
        np.searchsorted(truth.category_ids, truth.box_category_ids) + 1,
        truth.boxes_xywh,
        ids=np.arange(1, truth.num_boxes + 1),
        area=truth.areas,
        iscrowd=truth.crowd,
    )
    rows = np.empty((len(detections), 7), dtype=np.float64)
    rows[:, 0] = np.searchsorted(truth.image_ids, detections.image_ids) + 1
    rows[:, 1:5] = detections.boxes_xywh
    rows[:, 5] = detections.scores
    rows[:, 6] = np.searchsorted(truth.category_ids, detections.category_ids) + 1
    evaluation = hotcoco.COCOeval(annotated, annotated.load_res(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # computes stats as summarize() does, and prints nothing
    arrays: dict[str, Any] = evaluation.eval or {}
    return Accumulated(
        np.asarray(arrays["precision"], dtype=np.float64),
        np.asarray(arrays["recall"], dtype=np.float64),
        np.asarray(evaluation.stats, dtype=np.float64),
    )


def _nothing_evaluated(num_categories: int) -> Accumulated:
    return Accumulated(
        precision=np.full((10, 101, num_categories, 4, 3), -1.0),
        recall=np.full((10, num_categories, 4, 3), -1.0),
        stats=np.full(12, -1.0),
    )
