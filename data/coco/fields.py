"""A COCO JSON file as the checked fields of CocoAnnotations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.coco.columns import AnnotationError, Section, parse_coco
from data.coco.federated import NEGATIVE, NOT_EXHAUSTIVE, Federated
from data.coco.findings import MAX_PLACES, Finding
from data.coco.json_stream import kind_of
from data.coco.segmentations import pack

OF_ANNOTATIONS = ("boxes_xywh", "areas", "labels", "crowd", "ignore", "annotation_ids")
"""The arrays with a row for each annotation."""
_FAULTY: Any = object()


def read_fields(path: Path, masks: bool) -> tuple[dict[str, Any] | None, list[AnnotationError]]:
    """The fields of CocoAnnotations but `source`, by name, with all categories of the file as classes. None where there
    are errors, the first one of each column.
    """
    errors: list[AnnotationError] = []

    def checked(read: Callable[..., Any], *arguments: Any) -> Any:
        """What `read` gives; _FAULTY where it fails, or one of the arguments did."""
        if any(argument is _FAULTY for argument in arguments):
            return _FAULTY
        try:
            return read(*arguments)
        except AnnotationError as error:
            errors.append(error)
            return _FAULTY

    content = checked(parse_coco, path, masks)
    if content is _FAULTY:
        return None, errors
    checked(_require_sections, path, content)
    # Of an empty list _require_sections has said all.
    categories = checked(_section, path, content, "categories", masks) or _FAULTY
    category_ids = checked(Section.unique_ids, categories)
    named = checked(_read_categories, categories, category_ids, checked(Section.take, categories, "name"))
    images = checked(_section, path, content, "images", masks) or _FAULTY
    image_ids = checked(Section.unique_ids, images)
    widths, heights, _, names = (
        checked(Section.take, images, key) for key in ("width", "height", "decodable", "file_name")
    )
    federated = checked(_federated, images, image_ids, categories, category_ids)

    annotations = checked(_section, path, content, "annotations", masks)
    annotation_ids = checked(Section.unique_ids, annotations)
    image_indices = checked(Section.references, annotations, "image_id", image_ids, "images")
    labels = checked(Section.references, annotations, "category_id", checked(np.sort, category_ids), "categories")
    columns = ("bbox", "area", "iscrowd", "ignore")
    boxes_xywh, areas, crowd, ignore = (checked(Section.take, annotations, key) for key in columns)
    if errors:
        return None, errors

    remarks = {key: annotations.take(key) for key in ("no-area", "no-iscrowd", "crowd-without-rle")}
    no_area = remarks["no-area"]
    areas[no_area] = boxes_xywh[no_area, 2] * boxes_xywh[no_area, 3]
    segmentations = None
    if masks:
        sides = widths[image_indices], heights[image_indices]
        segmentations, faults = pack(annotations.take("segmentation"), *sides)
        remarks |= faults
    findings = [
        Finding.of(code, [f"annotation id {i}" for i in places], count=int(which.sum()), source=path)
        for code, which in remarks.items()
        if (places := annotation_ids[which][:MAX_PLACES].tolist())
    ]
    if (annotation_ids == 0).any():
        findings.append(Finding.of("annotation-id-0", source=path))
    offsets = offsets_of(np.bincount(image_indices, minlength=len(image_ids)))
    of_annotations = dict(zip(OF_ANNOTATIONS, (boxes_xywh, areas, labels, crowd, ignore, annotation_ids), strict=True))
    del boxes_xywh, areas, labels, crowd, ignore, annotation_ids  # each is let go as it is sorted
    if (np.diff(image_indices) < 0).any():
        order = np.argsort(image_indices, kind="stable")
        segmentations = segmentations and segmentations.take(order)
        for name in OF_ANNOTATIONS:
            of_annotations[name] = of_annotations[name][order]
    fields = {
        "image_ids": image_ids,
        "widths": widths,
        "heights": heights,
        "file_name_bytes": names[0],
        "file_name_offsets": offsets_of(names[1]),
        "offsets": offsets,
        **of_annotations,
        "category_ids": named[0],
        "class_names": named[1],
        "segmentations": segmentations,
        "federated": federated,
        "findings": tuple(findings),
    }
    return fields, errors


def _section(path: Path, content: dict[str, Any], name: str, masks: bool) -> Section:
    """The list of that name; one without records where the file has none."""
    found = content.get(name, [])
    if not isinstance(found, Section):
        if found and name != "annotations" or name == "annotations" and name in content:
            raise AnnotationError(
                f'{path}: "{name}" is {kind_of(found)}, expected a list of objects. Write the file in the COCO format.'
            )
        found = Section(path, name, masks)
    return found.whole()


def _federated(
    images: Section, image_ids: np.ndarray, categories: Section, category_ids: np.ndarray
) -> Federated | None:
    """None where no image has "neg_category_ids"; where one has, all need both lists."""
    if not images.has(NEGATIVE, list):
        return None
    frequencies = zip(category_ids.tolist(), categories.take("frequency"), strict=True)
    return Federated.of(image_ids, images.take(NEGATIVE), images.take(NOT_EXHAUSTIVE), frequencies)


def _require_sections(path: Path, content: dict[str, Any]) -> None:
    for section in ("images", "categories"):
        found = content.get(section)
        if isinstance(found, Section) and not len(found):
            raise AnnotationError(f'{path}: has no "{section}": the list is empty. Give a file with {section} in it.')
        if not found:
            raise AnnotationError(
                f'{path}: has no "{section}". Expected COCO\'s format, an object of "images", "annotations" and '
                '"categories": is this the right file?'
            )


def _read_categories(section: Section, ids: np.ndarray, names: list[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids and names of the categories, by ascending id."""
    id_of: dict[str, int] = {}
    for index, (category_id, name) in enumerate(zip(ids.tolist(), names, strict=True)):
        if name in id_of:
            section.fail(
                index,
                f"the name {name!r} is taken by category id {id_of[name]} already",
                "Give every category a name of its own, or join the two.",
            )
        id_of[name] = category_id
    ordered = sorted(id_of, key=lambda name: id_of[name])
    return tuple(id_of[name] for name in ordered), tuple(ordered)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where parts of these lengths begin, and where the last one ends."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
