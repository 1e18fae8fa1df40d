"""The programs that compute COCO's metrics of boxes and masks: pycocotools, the judge, and hotcoco, which is fast.

Both work on the same flat arrays and return the same three arrays; everything reported is derived from these
in one place, so a choice of backend can change the time it takes and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data.coco.run_lengths import RunLengths
from detection.evaluation.ground_truth import GroundTruth
from detection.evaluation.results import Detections, EvaluationError

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


def accumulate(backend: str, truth: GroundTruth, detections: Detections, *, masks: bool = False) -> Accumulated:
    """Matches and accumulates with a resolved backend.

    Args:
        truth: exactly the evaluated images and their boxes.
        detections: every one on an image and of a category of `truth`, finite.
        masks: the IoU of masks decides, which both have, and not that of boxes.

    Raises:
        EvaluationError: "both" was asked for and the two differ by more than 1e-9.
    """
    if not len(truth.image_ids):  # an empty list of images means all of them to COCOeval
        shape = (10, 101, len(truth.category_ids), 4, 3)
        return Accumulated(np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0), np.full(12, -1.0))
    if backend == "pycocotools":
        return accumulate_with_pycocotools(truth, detections, masks=masks)
    if backend == "hotcoco":
        return accumulate_with_hotcoco(truth, detections, masks=masks)
    assert backend == "both", backend
    judge, other = (
        program(truth, detections, masks=masks) for program in (accumulate_with_pycocotools, accumulate_with_hotcoco)
    )
    for field in ("stats", "precision", "recall"):
        expected, found = getattr(judge, field), getattr(other, field)
        difference = np.abs(expected - found)
        if difference.max(initial=0.0) > TOLERANCE:
            where = tuple(int(i) for i in np.unravel_index(difference.argmax(), expected.shape))
            raise EvaluationError(
                f"hotcoco and pycocotools disagree on {truth.source}: {field}{list(where)} is"
                f" {found[where]!r} and {expected[where]!r}. Trust pycocotools (backend 'pycocotools'), and"
                " report the case to hotcoco."
            )
    return judge


def accumulate_with_pycocotools(truth: GroundTruth, detections: Detections, *, masks: bool = False) -> Accumulated:
    """COCOeval itself, with what it prints thrown away. At least one image."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dataset = {
        # Of run lengths it reads an image's size, and does nothing with it.
        "images": [{"id": place, "height": 0, "width": 0} for place in range(len(truth.image_ids))],
        "categories": [{"id": label} for label in range(len(truth.category_ids))],
    }

    def side(key: str, run_lengths: RunLengths | None, *columns: npt.NDArray[Any]) -> COCO:
        keys = ["id", "image_id", "category_id", "bbox", "area", key]
        values: list[Any] = [column.tolist() for column in columns]
        if masks:
            assert run_lengths is not None
            keys.append("segmentation")
            values.append(run_lengths.entries())
        rows = zip(itertools.count(1), *values, strict=False)
        coco = COCO()
        coco.dataset = {**dataset, "annotations": [dict(zip(keys, row, strict=True)) for row in rows]}
        coco.createIndex()
        return coco

    boxes_xywh = detections.boxes_xywh.astype(np.float64)
    areas, scores = _areas(boxes_xywh, detections, masks), detections.scores.astype(np.float64)
    with contextlib.redirect_stdout(io.StringIO()):
        columns = truth.box_images, truth.box_labels, truth.boxes_xywh, truth.areas, truth.crowd
        annotated = side("iscrowd", truth.masks, *columns)
        found = side("score", detections.masks, *truth.places_of(detections), boxes_xywh, areas, scores)
        evaluation = COCOeval(annotated, found, iouType="segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = np.asarray(evaluation.stats, dtype=np.float64)
    return Accumulated(evaluation.eval["precision"], evaluation.eval["recall"], stats)


def accumulate_with_hotcoco(truth: GroundTruth, detections: Detections, *, masks: bool = False) -> Accumulated:
    """hotcoco's COCOeval, fed arrays. At least one image."""
    import hotcoco

    # hotcoco takes detections as one float array: places in the ascending order stand for ids, which may be
    # too large for a float to hold. The order, which decides ties between images, stays.
    outlines: Any = truth.masks.entries() if masks and truth.masks is not None else None
    annotated = hotcoco.COCO.from_arrays(
        [{"id": number} for number in range(1, len(truth.image_ids) + 1)],
        [{"id": number, "name": name} for number, name in enumerate(truth.class_names, start=1)],
        truth.box_images + 1,
        truth.box_labels + 1,
        truth.boxes_xywh,
        ids=np.arange(1, truth.num_boxes + 1),
        area=truth.areas,
        iscrowd=truth.crowd,
        segmentation=outlines,
    )
    images, labels = truth.places_of(detections)
    rows = np.column_stack([images + 1, detections.boxes_xywh, detections.scores, labels + 1]).astype(np.float64)
    if masks:
        assert detections.masks is not None
        # Entries without a box, so that areas are those of the masks.
        keys = ("image_id", "category_id", "score", "segmentation")
        columns = (images + 1, labels + 1, detections.scores.astype(np.float64))
        values = zip(*(column.tolist() for column in columns), detections.masks.entries(), strict=True)
        found = annotated.load_res([dict(zip(keys, row, strict=True)) for row in values])
    else:
        found = annotated.load_res(rows)
    evaluation = hotcoco.COCOeval(annotated, found, "segm" if masks else "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # computes stats as summarize() does, and prints nothing
    arrays: dict[str, Any] = evaluation.eval or {}
    return Accumulated(
        *(np.asarray(values, dtype=np.float64) for values in (arrays["precision"], arrays["recall"], evaluation.stats))
    )


def _areas(boxes_xywh: npt.NDArray[np.float64], detections: Detections, masks: bool) -> npt.NDArray[np.float64]:
    """float64 [n]: what the size class of each detection goes by."""
    if masks:
        assert detections.masks is not None
        return detections.masks.areas()
    return boxes_xywh[:, 2] * boxes_xywh[:, 3]
