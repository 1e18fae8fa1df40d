"""The boxes of a COCO annotation file as flat arrays: all that box evaluation needs of it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detection.evaluation.errors import EvaluationError


@dataclass(frozen=True)
class GroundTruth:
    """M annotated boxes on N images of K categories.

    The file's own annotation ids are left behind: backends number the boxes 1..M. (COCO's evaluation marks a
    matched detection with the id of its box, so that a box with id 0 would look unmatched, and equal ids
    would hide a box.)

    Attributes:
        source: the annotation file.
        image_ids: int64 [N], ascending.
        file_names: the N images' file names, "" where the file gives none.
        category_ids: int64 [K], ascending; class_names: their names, made unique.
        box_image_ids, box_category_ids: int64 [M], each among the above, in the file's order.
        boxes_xywh: float64 [M, 4] in pixels. areas: float64 [M] in pixels, which the size classes go by.
        crowd: bool [M]: detections on such a box count neither way.
        notes: what had to be filled in or passed over.
    """

    source: str
    image_ids: npt.NDArray[np.int64]
    file_names: tuple[str, ...]
    category_ids: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    box_image_ids: npt.NDArray[np.int64]
    box_category_ids: npt.NDArray[np.int64]
    boxes_xywh: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]
    notes: tuple[str, ...]

    @property
    def num_boxes(self) -> int:
        return len(self.box_image_ids)

    def restricted_to(self, image_ids: npt.NDArray[np.int64]) -> GroundTruth:
        """The same with only the images of `image_ids` (int64, ascending, all known) and their boxes."""
        if len(image_ids) == len(self.image_ids):
            return self
        kept_images = np.isin(self.image_ids, image_ids)
        kept_boxes = np.isin(self.box_image_ids, image_ids)
        return replace(
            self,
            image_ids=self.image_ids[kept_images],
            file_names=tuple(n for n, keep in zip(self.file_names, kept_images.tolist(), strict=True) if keep),
            box_image_ids=self.box_image_ids[kept_boxes],
            box_category_ids=self.box_category_ids[kept_boxes],
            boxes_xywh=self.boxes_xywh[kept_boxes],
            areas=self.areas[kept_boxes],
            crowd=self.crowd[kept_boxes],
        )


def read_ground_truth(annotation_file: str | os.PathLike[str]) -> GroundTruth:
    """Reads a COCO annotation file. The file is only read.

    A file without boxes (COCO's image_info_test-dev2017.json) is fine here and has num_boxes 0.
    Missing `area` becomes width x height and missing `iscrowd` 0, with a note.

    Raises:
        EvaluationError: no such file, not JSON, or an entry that cannot be read.
    """
    source = Path(annotation_file)
    content = _read_json(source)
    images = _entries(source, content, "images")
    categories = sorted(_entries(source, content, "categories"), key=lambda entry: entry["id"])
    images = sorted(images, key=lambda entry: entry["id"])
    annotations = content.get("annotations", [])
    if not isinstance(annotations, list):
        raise EvaluationError(f"{source}: 'annotations' must be a list, found {type(annotations).__name__}")
    for index, annotation in enumerate(annotations):
        fault = _fault_of_annotation(annotation)
        if fault:
            where = annotation.get("id", "none") if isinstance(annotation, dict) else "none"
            raise EvaluationError(
                f"{source}: annotation {index} (counted from 0; its id: {where}) {fault};"
                " correct or remove this annotation"
            )

    image_ids = np.array([entry["id"] for entry in images], dtype=np.int64)
    category_ids = np.array([entry["id"] for entry in categories], dtype=np.int64)
    box_image_ids = np.array([a["image_id"] for a in annotations], dtype=np.int64)
    box_category_ids = np.array([a["category_id"] for a in annotations], dtype=np.int64)
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    areas = np.array([math.nan if a.get("area") is None else a["area"] for a in annotations], dtype=np.float64)
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)

    notes = []
    no_area = np.isnan(areas)
    if no_area.any():
        areas = np.where(no_area, boxes[:, 2] * boxes[:, 3], areas)
        notes.append(f"{int(no_area.sum())} annotations have no 'area': width x height is used for the size classes")
    num_without_crowd = sum("iscrowd" not in a for a in annotations)
    if num_without_crowd:
        notes.append(f"{num_without_crowd} annotations have no 'iscrowd': taken as 0, ordinary objects")
    num_ignore = sum(bool(a.get("ignore")) and not a.get("iscrowd") for a in annotations)
    if num_ignore:
        notes.append(f"{num_ignore} annotations have 'ignore' set: COCO's evaluation goes by 'iscrowd' alone")
    known = np.isin(box_image_ids, image_ids) & np.isin(box_category_ids, category_ids)
    if not known.all():
        notes.append(f"{int((~known).sum())} annotations name an image or category that the file lacks: left out")

    return GroundTruth(
        source=str(source),
        image_ids=image_ids,
        file_names=tuple(str(entry.get("file_name", "")) for entry in images),
        category_ids=category_ids,
        class_names=_unique_names(categories),
        box_image_ids=box_image_ids[known],
        box_category_ids=box_category_ids[known],
        boxes_xywh=boxes[known],
        areas=areas[known],
        crowd=crowd[known],
        notes=tuple(notes),
    )


def _read_json(source: Path) -> dict[str, Any]:
    try:
        content = json.loads(source.read_bytes())
    except FileNotFoundError:
        raise EvaluationError(f"{source}: there is no such annotation file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{source}: not JSON ({error}); fetch or export the file again") from error
    if not isinstance(content, dict):
        raise EvaluationError(
            f"{source}: a COCO annotation file is an object with images, annotations and categories, this"
            f" one holds a {type(content).__name__}; a results file cannot stand in for it"
        )
    return content


def _entries(source: Path, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise EvaluationError(f"{source}: the list '{key}' is missing; every COCO annotation file has it")
    seen: set[int] = set()
    for index, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int):
            raise EvaluationError(f"{source}: {key}[{index}] has no whole-numbered 'id' (found {number!r:.80})")
        if number in seen:
            raise EvaluationError(f"{source}: the id {number} occurs twice in '{key}'; ids must be unique")
        seen.add(number)
    return entries


def _fault_of_annotation(annotation: Any) -> str | None:
    if not isinstance(annotation, dict):
        return f"is not an object but {annotation!r:.80}"
    for key in ("image_id", "category_id"):
        if not isinstance(annotation.get(key), int):
            return f"has {key} {annotation.get(key)!r:.80} where a whole number is needed"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        return f"has bbox {box!r:.80} where [left, top, width, height] is needed"
    for value in box:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"has bbox {box!r:.80}, whose numbers must be finite"
    area = annotation.get("area")
    if area is not None and not (isinstance(area, (int, float)) and math.isfinite(area)):
        return f"has area {area!r:.80} where a finite number is needed"
    return None


def _unique_names(categories: list[dict[str, Any]]) -> tuple[str, ...]:
    names = [str(entry.get("name", entry["id"])) for entry in categories]
    return tuple(
        f"{name} (id {entry['id']})" if names.count(name) > 1 else name
        for name, entry in zip(names, categories, strict=True)
    )
