"""Annotated boxes in the order in which COCO's evaluation counts them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data.coco.annotations import CocoAnnotations
from data.coco.federated import Federated
from data.coco.run_lengths import RunLengths, of_box
from detection.evaluation.results import Detections

_NOTES = {
    "no-outline": "annotations have no usable mask: the box stands in for it",
    "no-area": "annotations have no 'area': width x height is used for the size classes",
    "no-iscrowd": "annotations have no 'iscrowd': taken as 0, ordinary objects",
}
"""What evaluation says of a finding of the reader, by its code."""
_NO_SIZE = 1e12
"""Square pixels beyond every size class: LVIS's evaluation ignores such a box as it does one with "ignore" set."""


@dataclass(frozen=True)
class GroundTruth:
    """M annotated boxes on N images of K categories.

    The file's own annotation ids are left behind: backends number the boxes 1..M. (COCO's evaluation marks a
    matched detection with the id of its box, so that a box with id 0 would look unmatched.)

    Attributes:
        source: the annotation file.
        image_ids: int64 [N], ascending. file_names: the N images' file names.
        category_ids: int64 [K], ascending. class_names: their names.
        box_images, box_labels: int64 [M], places in image_ids and category_ids.
        boxes_xywh: float64 [M, 4] in pixels. areas: float64 [M] in pixels, which the size classes go by.
        masks: of each box, at the size of its image, where the annotations were read with outlines; without one the box
            stands in.
        crowd: bool [M]: detections on such a box count neither way.
        federated: of an LVIS file, which is judged by LVIS's rules: classes that images were searched for, by ids.
        notes: what had to be filled in or passed over.
    """

    source: str
    image_ids: npt.NDArray[np.int64]
    file_names: tuple[str, ...]
    category_ids: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    box_images: npt.NDArray[np.int64]
    box_labels: npt.NDArray[np.int64]
    boxes_xywh: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]
    notes: tuple[str, ...]
    masks: RunLengths | None = None
    federated: Federated | None = None

    @staticmethod
    def of(annotations: CocoAnnotations) -> GroundTruth:
        """All images of the file, and the boxes of its classes. Shares the boxes' memory."""
        image_order, label_order = np.argsort(annotations.image_ids), np.argsort(annotations.category_ids)
        counts = {finding.code: finding.count for finding in annotations.findings}
        notes = [f"{counts[code]} {text}" for code, text in _NOTES.items() if code in counts]
        areas, federated = annotations.areas, annotations.federated
        if federated is not None:
            notes = [note for note in notes if not note.endswith(_NOTES["no-iscrowd"])]  # LVIS has no crowds
            areas = np.where(annotations.ignore & (areas > 0), _NO_SIZE, areas)
        elif num_ignored := int((annotations.ignore & ~annotations.crowd).sum()):
            notes.append(f"{num_ignored} annotations have 'ignore' set: COCO's evaluation goes by 'iscrowd' alone")
        return GroundTruth(
            source=annotations.source,
            image_ids=annotations.image_ids[image_order],
            file_names=tuple(annotations.file_name(index) for index in image_order.tolist()),
            category_ids=np.array(annotations.category_ids, dtype=np.int64)[label_order],
            class_names=tuple(annotations.class_names[label] for label in label_order.tolist()),
            box_images=np.argsort(image_order)[annotations.image_indices],
            box_labels=np.argsort(label_order)[annotations.labels],
            boxes_xywh=annotations.boxes_xywh,
            areas=areas,
            crowd=annotations.crowd,
            notes=tuple(notes),
            masks=_masks(annotations),
            federated=federated,
        )

    @property
    def num_boxes(self) -> int:
        return len(self.box_images)

    def restricted_to(self, image_ids: npt.NDArray[np.int64]) -> GroundTruth:
        """The same with only the images of `image_ids` (int64, ascending, all known) and their boxes."""
        if len(image_ids) == len(self.image_ids):
            return self
        kept = np.searchsorted(self.image_ids, image_ids)
        truth = self.with_boxes(np.isin(self.box_images, kept))
        return replace(
            truth,
            image_ids=image_ids,
            file_names=tuple(self.file_names[place] for place in kept.tolist()),
            box_images=np.searchsorted(kept, truth.box_images),
        )

    def with_boxes(self, rows: npt.NDArray[Any]) -> GroundTruth:
        """The same images with the boxes that an index or bool array [n] names."""
        return replace(
            self,
            box_images=self.box_images[rows],
            box_labels=self.box_labels[rows],
            boxes_xywh=self.boxes_xywh[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
            masks=self.masks and self.masks.take(rows),
        )

    def of_classes(self, classes: slice, rows: npt.NDArray[np.int64], images: npt.NDArray[Any]) -> GroundTruth:
        """Neighboring classes alone, with the boxes `rows` (all that these classes have), on the images of the places
        `images` (int64, ascending)."""
        truth = self.with_boxes(rows)
        return replace(
            truth,
            image_ids=self.image_ids[images],
            file_names=(),
            category_ids=self.category_ids[classes],
            class_names=self.class_names[classes],
            box_images=np.searchsorted(images, truth.box_images),
            box_labels=truth.box_labels - classes.start,
        )

    def places_of(self, detections: Detections) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Places of each detection's image and category in image_ids and category_ids, int64 [n] each.

        Every detection must be on one of the images and of one of the categories.
        """
        images = np.searchsorted(self.image_ids, detections.image_ids)
        return images, np.searchsorted(self.category_ids, detections.category_ids)


def _masks(annotations: CocoAnnotations) -> RunLengths | None:
    outlines = annotations.segmentations
    if outlines is None:
        return None
    images = annotations.image_indices
    sizes = np.stack([annotations.heights[images], annotations.widths[images]], axis=1)
    texts = [
        outlines.compressed(row, *size) if present else of_box(box, *size)
        for row, (present, box, size) in enumerate(
            zip(outlines.present.tolist(), annotations.boxes_xywh.tolist(), sizes.tolist(), strict=True)
        )
    ]
    return RunLengths.of(texts, sizes)
