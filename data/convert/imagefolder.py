"""Hugging Face's imagefolder: images, and a metadata.jsonl in their folder or above it that says what is in each.

A record is {"file_name": "0001.png", "objects": {"bbox": [[x, y, width, height], ...], "categories": [0, ...]}}, boxes
in pixels as COCO has them; "objects" may also be a list of one such object each. Categories are names, or numbers of
the names in classes.txt or in the README.md of the set (dataset_info, class_label).
"""

from __future__ import annotations

import json
import os
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from data.convert.conversion import (
    SHARED_TEXTS,
    ConversionError,
    Corners,
    LabeledBox,
    LabeledImage,
    LeftOut,
    Progress,
    Remarks,
    add_box,
    derived_classes,
    fit_box,
    image_facts,
)
from data.convert.files import read_class_file, read_text
from data.convert.labeled_set import LabeledSet
from data.convert.splits import split_of_path
from data.images.files import walk

METADATA = "metadata.jsonl"
CATEGORY_KEYS = ("categories", "category", "category_id", "labels", "label")
CLASS_LABELS = re.compile(r"class_label:\s*\n\s*names:\s*\n((?:\s*['\"]?\d+['\"]?:.*\n)+)")

IMAGEFOLDER_TEXTS = {
    "faulty-record": "error: records are no image with objects: expected are file_name, and objects with as many bbox "
    "(x, y, width, height in pixels) as categories. Mend or delete the line",
    "image-twice": "error: an image is in two records. Join them",
    "missing-image": "error: images that a record names are missing. Add them, or delete the line",
    **SHARED_TEXTS,
}


def imagefolder_set(
    root: Path, remarks: Remarks, *, meant: tuple[str, ...] = (), progress: Progress = lambda _: None
) -> LabeledSet:
    """The images that the metadata.jsonl files below `root` name; splits are folders named train, val or test.

    remarks: made of IMAGEFOLDER_TEXTS; an image with an error is left out. meant: classes that are different ones
    however alike their names.

    Raises ConversionError where there is no such file, or no object.
    """
    files = [file for file in walk(root, {".jsonl"}) if file.name == METADATA]
    if not files:
        raise ConversionError(f"{root}: no {METADATA} there")
    listed = _class_list(root)
    found: dict[str, list[LabeledImage]] = {}
    seen: dict[str, int] = {}
    for file in files:
        for number, line in enumerate(read_text(file, "Write it as UTF-8").splitlines(), 1):
            if not line.strip():
                continue
            progress(1)
            errors = remarks.num_errors
            try:
                image = _image(line, file, f"{file}, line {number}", root, listed, remarks)
            except LeftOut as reason:
                remarks.leave_out(reason)
                continue
            if seen.setdefault(image.key, number) != number:
                remarks.add("image-twice", f"{file}, line {number}: {image.path} is in line {seen[image.key]} too")
            if remarks.num_errors == errors:
                found.setdefault(split_of_path(image.path, root), []).append(image)
    images = [image for split in found.values() for image in split]
    names = derived_classes(images, remarks, meant)
    if all(name.isdigit() for name in names):
        names.sort(key=int)
    if not names and not remarks.num_errors:
        raise ConversionError(f"{files[0]}: no object in any record: there is nothing to train on")
    return LabeledSet(
        found,
        f"the folders of {root}",
        list(listed.values()) if listed is not None else names,
        remarks,
        description=f"converted from the imagefolder {root}",
        images_root=root,
    )


def _image(
    line: str, file: Path, place: str, root: Path, listed: dict[int, str] | None, remarks: Remarks
) -> LabeledImage:
    """One record. Raises LeftOut where it is none."""
    try:
        record = json.loads(line)
        name, boxes = record["file_name"], _boxes(record["objects"])
        path = file.parent / name
    except (ValueError, KeyError, TypeError):
        raise LeftOut("faulty-record", f"{place}: {line[:60]}") from None
    if not path.is_file():
        raise LeftOut("missing-image", f"{place}: {path}")
    facts = image_facts(path)
    if facts.orientation != 1:
        remarks.add("exif-turned", f"{path}: orientation {facts.orientation}, taken as stored")
    # With its suffix: here two images may differ in that alone.
    image = LabeledImage(Path(os.path.relpath(path, root)).as_posix(), path, facts.width, facts.height)
    for category, (x, y, width, height) in boxes:
        if listed is not None and isinstance(category, int):
            if category not in listed:
                raise LeftOut("unknown-class", f"{place}: category {category} of {len(listed)}")
            category = listed[category]
        elif listed is not None and category not in listed.values():
            raise LeftOut("unknown-class", f"{place}: {category!r}")
        corners = fit_box((x, y, x + width, y + height), facts.width, facts.height, remarks, place)
        if corners is not None:
            add_box(image, LabeledBox(str(category), corners), remarks, place)
    if not image.boxes:
        remarks.add("empty", str(path))
    return image


def _boxes(objects: Any) -> list[tuple[int | str, Corners]]:
    """Category and x, y, width, height of each object. Raises ValueError, KeyError or TypeError where they are none."""
    if isinstance(objects, dict):
        key = next((key for key in CATEGORY_KEYS if key in objects), CATEGORY_KEYS[0])
        pairs = list(zip(objects[key], objects["bbox"], strict=True))
    else:
        pairs = [(next(one[key] for key in CATEGORY_KEYS if key in one), one["bbox"]) for one in objects]
    boxes: list[tuple[int | str, Corners]] = []
    for category, values in pairs:
        try:
            x, y, width, height = (Decimal(str(value)) for value in values)
        except InvalidOperation:
            raise ValueError from None
        if not (x + y + width + height).is_finite() or not isinstance(category, int | str):
            raise ValueError
        boxes.append((category, (x, y, width, height)))
    return boxes


def _class_list(root: Path) -> dict[int, str] | None:
    """Class names by number, of classes.txt or the set's README.md; None without them."""
    if (root / "classes.txt").is_file():
        return dict(enumerate(read_class_file(root / "classes.txt")))
    card = root / "README.md"
    match = CLASS_LABELS.search(read_text(card, "Write it as UTF-8")) if card.is_file() else None
    if match is None:
        return None
    pairs = (line.split(":", 1) for line in match[1].splitlines() if line.strip())
    return {int(number.strip(" '\"")): name.strip(" '\"") for number, name in pairs}
