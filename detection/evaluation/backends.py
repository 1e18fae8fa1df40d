"""The programs that compute COCO's metrics of boxes and masks: pycocotools, the judge, and hotcoco, which is fast.

Both work on the same flat arrays and return the same three arrays; everything reported is derived from these
in one place, so a choice of backend can change the time it takes and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data.coco.run_lengths import RunLengths
from detection.evaluation.federated import MAX_DETECTIONS, judged
from detection.evaluation.ground_truth import GroundTruth
from detection.evaluation.results import Detections, EvaluationError

BACKENDS = ("auto", "pycocotools", "hotcoco", "both")
TOLERANCE = 1e-9  # what "both" lets the backends differ by; they are equal to the last bit where all is well
ROWS_AT_ONCE = {"pycocotools": 1, "hotcoco": 1_000_000}
"""Boxes and detections that a program has at once, but for one class that has more. Classes are judged apart, so that
memory grows with the largest one. pycocotools looks at every image for every class: alone, at those that have it."""


@dataclass(frozen=True)
class Accumulated:
    """COCOeval's accumulated results: T = 10 IoU thresholds 0.50:0.05:0.95, R = 101 recall points, K
    categories (ascending ids), A = 4 size classes (all, small, medium, large), L = 3 limits on detections
    per image and class (1, 10, 100), or L = 1 by LVIS's rules (300 an image). -1 stands where no box counts.

    Attributes:
        precision: float64 [T, R, K, A, L].
        recall: float64 [T, K, A, L].
    """

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]


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
    lenient = None
    if truth.federated is not None:
        truth, detections, lenient = judged(truth, detections, _areas(detections, masks))
    if backend != "both":
        return _by_classes(backend, truth, detections, lenient, masks)
    judge, other = (_by_classes(name, truth, detections, lenient, masks) for name in ("pycocotools", "hotcoco"))
    for field in ("precision", "recall"):
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


def _by_classes(
    backend: str, truth: GroundTruth, detections: Detections, lenient: npt.NDArray[np.bool_] | None, masks: bool
) -> Accumulated:
    """What the program finds for a few classes at a time, put together."""
    program: Callable[..., Accumulated] = {
        "pycocotools": accumulate_with_pycocotools,
        "hotcoco": accumulate_with_hotcoco,
    }[backend]
    num_classes = len(truth.category_ids)
    precision = np.full((10, 101, num_classes, 4, 3 if lenient is None else 1), -1.0)
    recall = np.full((10, *precision.shape[2:]), -1.0)
    for classes, boxes, rows in _class_groups(truth, detections, ROWS_AT_ONCE[backend]):
        found = detections.take(rows)
        images = np.union1d(truth.box_images[boxes], np.searchsorted(truth.image_ids, found.image_ids))
        some = truth.of_classes(classes, boxes, images)
        part = program(some, found, None if lenient is None else lenient[rows], masks=masks)
        precision[:, :, classes], recall[:, classes] = part.precision, part.recall
    return Accumulated(precision, recall)


def _class_groups(
    truth: GroundTruth, detections: Detections, most: int
) -> Iterator[tuple[slice, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Neighboring classes that have boxes, with their boxes and detections: rows in the order that they have there."""
    of_boxes, of_detections = truth.box_labels, truth.places_of(detections)[1]
    boxes, rows = (np.argsort(labels, kind="stable") for labels in (of_boxes, of_detections))
    classes = np.arange(len(truth.category_ids) + 1)
    box_ends, row_ends = (
        np.searchsorted(labels[order], classes) for labels, order in ((of_boxes, boxes), (of_detections, rows))
    )
    start = 0
    while start < len(classes) - 1:
        last = np.searchsorted(box_ends + row_ends, box_ends[start] + row_ends[start] + most, side="right") - 1
        stop = max(int(last), start + 1)
        if box_ends[stop] > box_ends[start]:  # else no figure of them is defined
            group = boxes[box_ends[start] : box_ends[stop]], rows[row_ends[start] : row_ends[stop]]
            yield slice(start, stop), *group
        start = stop


def accumulate_with_pycocotools(
    truth: GroundTruth, detections: Detections, lenient: npt.NDArray[np.bool_] | None = None, *, masks: bool = False
) -> Accumulated:
    """COCOeval itself, with what it prints thrown away. At least one image.

    lenient: bool [n]: LVIS's rules are asked for, and these detections are no error where no box answers to them.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Lenient(COCOeval):  # type: ignore[misc]
        def evaluateImg(self, *place: Any) -> dict[str, Any] | None:  # noqa: N802 - its name there
            found = super().evaluateImg(*place)
            if found is not None and lenient is not None:
                spared = lenient[np.array(found["dtIds"], dtype=np.int64) - 1]
                found["dtIgnore"] = np.logical_or(found["dtIgnore"], (found["dtMatches"] == 0) & spared)
            return found

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

    boxes_xywh, scores = detections.boxes_xywh.astype(np.float64), detections.scores.astype(np.float64)
    with contextlib.redirect_stdout(io.StringIO()):
        columns = truth.box_images, truth.box_labels, truth.boxes_xywh, truth.areas, truth.crowd
        annotated = side("iscrowd", truth.masks, *columns)
        areas = _areas(detections, masks)
        found = side("score", detections.masks, *truth.places_of(detections), boxes_xywh, areas, scores)
        evaluation = Lenient(annotated, found, iouType="segm" if masks else "bbox")
        if lenient is not None:
            evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    return Accumulated(evaluation.eval["precision"], evaluation.eval["recall"])


def accumulate_with_hotcoco(
    truth: GroundTruth, detections: Detections, lenient: npt.NDArray[np.bool_] | None = None, *, masks: bool = False
) -> Accumulated:
    """hotcoco's COCOeval, fed arrays. At least one image. lenient: see accumulate_with_pycocotools."""
    import hotcoco

    # hotcoco takes detections as one float array: places in the ascending order stand for ids, which may be
    # too large for a float to hold. The order, which decides ties between images, stays.
    image_places, labels = truth.places_of(detections)
    images: list[dict[str, Any]] = [{"id": number} for number in range(1, len(truth.image_ids) + 1)]
    categories: list[dict[str, Any]] = [{"id": n, "name": name} for n, name in enumerate(truth.class_names, start=1)]
    if lenient is not None:
        # What remains is judged: the image was searched for every class that is found there.
        for key, which in (("neg_category_ids", slice(None)), ("not_exhaustive_category_ids", lenient)):
            for image in images:
                image[key] = []
            for place, label in np.unique(np.stack([image_places[which], labels[which]]), axis=1).T.tolist():
                images[place][key].append(label + 1)
        categories = [each | {"frequency": "f"} for each in categories]
    outlines: Any = truth.masks.entries() if masks and truth.masks is not None else None
    annotated = hotcoco.COCO.from_arrays(
        images,
        categories,
        truth.box_images + 1,
        truth.box_labels + 1,
        truth.boxes_xywh,
        ids=np.arange(1, truth.num_boxes + 1),
        area=truth.areas,
        iscrowd=truth.crowd,
        segmentation=outlines,
    )
    scores = detections.scores.astype(np.float64)
    if masks:
        assert detections.masks is not None
        # Entries without a box, so that areas are those of the masks.
        keys = ("image_id", "category_id", "score", "segmentation")
        columns = (image_places + 1, labels + 1, scores)
        values = zip(*(column.tolist() for column in columns), detections.masks.entries(), strict=True)
        found = annotated.load_res([dict(zip(keys, row, strict=True)) for row in values])
    else:
        rows = np.empty((len(detections), 7))
        rows[:, 0], rows[:, 1:5], rows[:, 5], rows[:, 6] = image_places + 1, detections.boxes_xywh, scores, labels + 1
        found = annotated.load_res(rows)
    evaluation = hotcoco.COCOeval(annotated, found, "segm" if masks else "bbox", lvis_style=lenient is not None)
    evaluation.evaluate()
    evaluation.accumulate()
    arrays: dict[str, Any] = evaluation.eval or {}
    precision, recall = (np.asarray(arrays[name], dtype=np.float64) for name in ("precision", "recall"))
    return Accumulated(precision, recall)


def _areas(detections: Detections, masks: bool) -> npt.NDArray[np.float64]:
    """float64 [n]: what the size class of each detection goes by."""
    if masks:
        assert detections.masks is not None
        return detections.masks.areas()
    sides = detections.boxes_xywh[:, 2:].astype(np.float64)
    return sides[:, 0] * sides[:, 1]
