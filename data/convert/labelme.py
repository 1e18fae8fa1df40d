"""LabelMe's files: beside each image a JSON file with the shapes that were drawn on it.

{"shapes": [{"label": "cat", "points": [[x, y], ...], "shape_type": "polygon", "group_id": null}, ...],
"imagePath": "0001.jpg", "imageHeight": 480, "imageWidth": 640}. Polygons, rectangles and circles are objects; shapes of
one label and one group_id are one object. LabelMe turns images as their EXIF data say before anything is drawn.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path, PureWindowsPath
from typing import Any

from data.coco.columns import MAX_COORDINATE
from data.convert.conversion import (
    SHARED_TEXTS,
    ConversionError,
    ImageFacts,
    LabeledBox,
    LabeledImage,
    LeftOut,
    Progress,
    Remarks,
    Ring,
    add_box,
    box_of_rings,
    derived_classes,
    fit_box,
    image_facts,
    ring_to_stored,
    rounded,
)
from data.convert.labeled_set import LabeledSet
from data.convert.splits import split_of_path
from data.images.files import IMAGE_SUFFIXES, walk

CIRCLE_POINTS = 64  # a circle's outline is then within a thousandth of its radius

LABELME_TEXTS = {
    "faulty-file": "error: files are no annotation of LabelMe: expected are shapes, each with label, points (x, y) and "
    "shape_type. Mend or delete the file",
    "missing-image": "error: images of annotation files are missing. Add them, or delete the file",
    "size-differs": "error: images have another size than the annotation file says, so their shapes are misplaced. Use "
    "the images that were annotated",
    **SHARED_TEXTS,
    "no-outline": "warning: shapes without an outline (points, lines, masks of AI tools) were left out",
    "no-label-file": "warning: images have no annotation file and count as background. Is it missing?",
}


def labelme_set(
    root: Path, remarks: Remarks, *, meant: tuple[str, ...] = (), progress: Progress = lambda _: None
) -> LabeledSet:
    """The images below `root` with the shapes of the JSON files beside them; splits are folders such as train and val.

    remarks: made of LABELME_TEXTS; an image with an error is left out. meant: classes that are different ones however
    alike their names.

    Raises ConversionError where there is no such file.
    """
    files = [file for file in walk(root, {".json"}) if is_labelme(file)]
    if not files:
        raise ConversionError(f"{root}: no annotation file of LabelMe there (JSON with shapes and imagePath)")
    found: dict[str, list[LabeledImage]] = {}
    seen: dict[Path, Path] = {}
    for file in files:
        progress(1)
        errors = remarks.num_errors
        try:
            image = _image(file, root, remarks)
        except LeftOut as reason:
            remarks.leave_out(reason)
            continue
        if seen.setdefault(image.path, file) != file:
            remarks.add("duplicate-stem", f"{seen[image.path]} and {file} ({image.path})")
        if remarks.num_errors == errors:
            found.setdefault(split_of_path(image.path, root), []).append(image)
    for path in walk(root, IMAGE_SUFFIXES):
        if path not in seen and not path.with_suffix(".json").is_file():
            try:
                facts = image_facts(path)
            except LeftOut as reason:
                remarks.leave_out(reason)
                continue
            remarks.add("no-label-file", str(path))
            empty = LabeledImage(_key(path, root), path, facts.width, facts.height)
            found.setdefault(split_of_path(path, root), []).append(empty)
    images = [image for split in found.values() for image in split]
    return LabeledSet(
        found,
        f"the folders of {root}",
        derived_classes(images, remarks, meant),
        remarks,
        description=f"converted from the LabelMe files of {root}",
        images_root=root,
    )


def is_labelme(file: Path) -> bool:
    """Whether a JSON file is LabelMe's, by its keys; imageData, the image as text, may stand before or behind them."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return b'"shapes"' in content and b'"imagePath"' in content


def _key(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _image(file: Path, root: Path, remarks: Remarks) -> LabeledImage:
    """The image of a file. Raises LeftOut where it is none."""
    try:
        content = json.loads(file.read_bytes(), parse_float=Decimal)
        shapes = list(_shapes(content["shapes"]))
        name, sides = str(content["imagePath"]), (content.get("imageWidth"), content.get("imageHeight"))
    except (ValueError, KeyError, TypeError, AttributeError, InvalidOperation, RecursionError) as error:
        raise LeftOut("faulty-file", f"{file}: {error!r:.80}") from None
    path = _image_path(file, name)
    facts = image_facts(path)
    turned = sides == facts.displayed_size or sides == (None, None)
    if not turned and sides != (facts.width, facts.height):
        raise LeftOut("size-differs", f"{path}: {facts.width}x{facts.height}, {file} says {sides[0]}x{sides[1]}")
    image = LabeledImage(_key(path, root), path, facts.width, facts.height)
    objects: dict[Any, tuple[str, list[Ring]]] = {}
    for number, (label, group, kind, points) in enumerate(shapes):
        ring = _ring(kind, points)
        if ring is None:
            remarks.add("no-outline", f"{file}, shape {number + 1}: {kind}")
            continue
        identity = (label, number) if group is None else (label, "group", group)
        objects.setdefault(identity, (label, []))[1].append(_stored(ring, facts, turned))
    for number, (label, rings) in enumerate(objects.values(), 1):
        place = f"{file}, object {number}"
        corners = fit_box(box_of_rings(rings), facts.width, facts.height, remarks, place)
        if corners is not None:
            x1, y1, x2, y2 = rounded(corners)
            add_box(image, LabeledBox(label, (x1, y1, x2, y2), rings=tuple(map(rounded, rings))), remarks, place)
    if turned and facts.orientation != 1 and image.boxes:
        remarks.add("exif-mapped", str(path))
    if not image.boxes:
        remarks.add("empty", str(path))
    return image


def _image_path(file: Path, name: str) -> Path:
    written = file.parent / PureWindowsPath(name).as_posix()
    beside = [file.with_suffix(suffix) for suffix in sorted(IMAGE_SUFFIXES)]
    # Whoever moves a folder, or renames both, leaves imagePath as it was.
    for path in (written, file.parent / PureWindowsPath(name).name, *beside):
        if path.is_file():
            return Path(os.path.normpath(path))
    raise LeftOut("missing-image", f"{file}: {written}")


def _shapes(shapes: Any) -> Iterator[tuple[str, Any, str, list[tuple[Decimal, Decimal]]]]:
    """Label, group, kind and points of each shape. Raises ValueError, KeyError or TypeError where it is none."""
    for shape in shapes:
        points = [(Decimal(x), Decimal(y)) for x, y in shape["points"]]
        if not all(value.is_finite() and -MAX_COORDINATE <= value <= MAX_COORDINATE for p in points for value in p):
            raise ValueError("points that are no numbers, or beyond any image")
        label, group = shape["label"], shape.get("group_id")
        if not isinstance(label, str) or not label.strip() or "\0" in label or not isinstance(group, int | str | None):
            raise ValueError(f"label {label!r:.40}, group_id {group!r:.40}")
        label.encode()  # half a surrogate pair is no text
        yield label, group, str(shape.get("shape_type") or "polygon"), points


def _ring(kind: str, points: list[tuple[Decimal, Decimal]]) -> Ring | None:
    """The outline of a shape; None where it has none."""
    if kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    elif kind == "circle" and len(points) == 2:
        (x, y), (edge_x, edge_y) = points
        radius = math.hypot(edge_x - x, edge_y - y)
        angles = [2 * math.pi * number / CIRCLE_POINTS for number in range(CIRCLE_POINTS)]
        points = [(x + Decimal(radius * math.cos(a)), y + Decimal(radius * math.sin(a))) for a in angles]
    elif kind not in ("polygon", "rectangle") or len(points) < 3:
        return None
    return tuple(value for point in points for value in point)


def _stored(ring: Ring, facts: ImageFacts, turned: bool) -> Ring:
    return ring_to_stored(ring, facts) if turned else ring
