"""YOLO's label files, read and written: a text file for each image, a line "class cx cy w h" for each object.

Center and size are fractions of the image's width and height, edges counted from 0. The label file of
.../images/NAME.jpg is .../labels/NAME.txt (the last folder of that name in the path), or NAME.txt beside the image.
An image without a label file, or with an empty one, is background. The programs that train on such files turn
images as their EXIF data say, so that is what the fractions are taken to refer to, and boxes are turned back to the
pixels as stored, which all the rest of this project means.

A line "class x1 y1 x2 y2 ..." is a polygon (YOLO segmentation): its outline is read, with the box round it. Boxes and
outlines read are rounded to a hundredth of a pixel, COCO's own precision. Boxes written have DIGITS decimals, so that
images of up to MAX_EXACT_SIDE pixels give back every hundredth: COCO -> YOLO -> COCO is exact for boxes in
hundredths of a pixel.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from data.convert.conversion import (
    SHARED_TEXTS,
    ConversionError,
    Corners,
    Exif,
    ImageFacts,
    LabeledBox,
    LabeledImage,
    LeftOut,
    Progress,
    Remarks,
    Ring,
    add_box,
    box_of_rings,
    counted,
    fit_box,
    image_facts,
    ring_to_stored,
    rounded,
    to_displayed,
    to_stored,
)
from data.convert.files import looks_like_yolo_labels
from data.convert.labeled_set import LabeledSet
from data.convert.splits import SPLIT_OF_FOLDER, split_of_path
from data.convert.yolo_config import CLASS_FILES, YoloSettings, read_settings
from data.images.files import IMAGE_SUFFIXES, walk

DIGITS = 8
MAX_EXACT_SIDE = 300_000  # pixels; the error of a corner, 0.75e-8 of the side, stays below half a hundredth
ROBOFLOW_FOLDERS = ("../valid/images", "../val/images")
MAX_FRACTION = 2  # anything beyond is no fraction of an image but pixels

YOLO_TEXTS = {
    "missing-image": "error: label files have no image. Add it, or delete the label file",
    "listed-missing": "error: images named in a list are missing. Correct the list, or add the image",
    "faulty-line": "error: lines are no object: five numbers are expected, the class index, then center x, center y, "
    "width and height as fractions of the image. Mend or delete the line",
    "not-fractions": "error: boxes are not fractions of the image (0 to 1) but seem to be pixels. Divide x and width "
    "by the image's width, y and height by its height",
    **SHARED_TEXTS,
    "polygon": "info: lines are polygons (segmentation or rotated boxes); each was kept, with the box round it",
    "no-label-file": "warning: images have no label file and count as background. Is it missing?",
}


@dataclass
class YoloSet:
    """Images by split: train, val and test; "all" for those of which nothing says it."""

    splits: dict[str, list[Path]]
    settings: YoloSettings
    origin: str
    """What the splits were taken from, for a message."""
    missing: str
    """Splits that the settings name and that are not there."""


def find_yolo(root: Path, *, settings_file: Path | None = None, images: Path | None = None) -> YoloSet:
    """The images, class names and splits of a folder.

    settings_file: data.yaml, obj.data or a list of class names; searched for in `root` where None. images: only the
    images below this folder. Splits are those of the settings, else of folders named train and val (or valid), also
    within "images".

    Raises ConversionError where there are no class names or no images.
    """
    for folder in (root, images):
        if folder is not None and not folder.is_dir():
            raise ConversionError(f"{folder}: there is no such folder. Give the one that holds the YOLO files")
    settings = read_settings(settings_file or _find_settings(root))
    splits: dict[str, list[Path]] = {}
    missing: list[str] = []
    if settings.splits and images is None:
        origin = str(settings.source)
        for name in settings.splits:
            found = _images_of(root, settings, name)
            if found is None:
                missing.append(name)
            else:
                splits[name] = found
        if "train" in missing:
            listed = {path for paths in splits.values() for path in paths}
            splits["train"] = [path for path in walk(_plain(root), IMAGE_SUFFIXES) if path not in listed]
    else:
        origin = f"the folders of {images or root}"
        base = _plain(images or root)
        for path in walk(base, IMAGE_SUFFIXES):
            splits.setdefault(split_of_path(path, base), []).append(path)
    splits = {name: paths for name, paths in splits.items() if paths}
    if not splits:
        raise ConversionError(f"{images or root}: no images there ({' '.join(sorted(IMAGE_SUFFIXES))})")
    if set(splits.get("train", [])) == set(splits.get("val", splits.get("train", []))):
        rest = splits.pop("val", [])
        if "test" not in splits or rest:
            splits["all"] = sorted({*splits.pop("train", []), *splits.get("all", []), *rest})
    twice = set(splits.get("train", [])) & set(splits.get("val", []))
    if twice:
        raise ConversionError(
            f"{origin}: {len(twice)} images are in train and in val, the first {min(twice)}. Take them out of one, "
            "or give --val-fraction for splits of our own"
        )
    lists = ", ".join(f"{name} ({' '.join(settings.splits[name])})" for name in missing)
    return YoloSet(splits, settings, origin, lists)


def yolo_set(
    found: YoloSet, root: Path, remarks: Remarks, *, exif: Exif = "auto", progress: Progress = lambda _: None
) -> LabeledSet:
    """The images of `found`, what find_yolo gives of `root`, with the boxes of their label files.

    Raises ConversionError where no image has a label file.
    """
    class_names = found.settings.class_names
    paths = sorted({path for split in found.splits.values() for path in split})
    images = read_yolo(paths, class_names, remarks, root=root, exif=exif, progress=progress)
    check_orphans(paths, remarks)
    if paths and remarks.count("no-label-file") == len(paths):
        raise ConversionError(
            f"{root}: none of the {counted(len(paths), 'image')} has a label file. They are searched for in "
            '"labels" instead of the last "images" of the path, and beside the image'
        )
    by_path = {image.path: image for image in images}
    return LabeledSet(
        {name: [by_path[path] for path in split if path in by_path] for name, split in found.splits.items()},
        found.origin,
        class_names,
        remarks,
        description=f"converted from the YOLO files of {root}",
        facts=({"not there": found.missing} if found.missing else {})
        | {"splits": "", "classes": f"{len(class_names)} ({found.settings.source})"},
    )


def read_yolo(
    images: Sequence[Path],
    class_names: Sequence[str],
    remarks: Remarks,
    *,
    root: Path,
    exif: Exif = "auto",
    progress: Progress = lambda _: None,
) -> list[LabeledImage]:
    """The images with the boxes of their label files, keys relative to `root`.

    exif: "auto" is "displayed" (see the head of this file). remarks: made of YOLO_TEXTS; an image with an error is
    left out.
    """
    result = []
    claimed: dict[Path, Path] = {}
    for path in images:
        errors = remarks.num_errors
        label_file = find_label_file(path)
        if claimed.setdefault(label_file, path) != path:
            remarks.add("duplicate-stem", f"{claimed[label_file]} and {path} ({label_file})")
        try:
            image = _read_image(path, label_file, class_names, remarks, root, exif)
            result += [image] if remarks.num_errors == errors else []
        except LeftOut as reason:
            remarks.leave_out(reason)
        progress(1)
    return result


def check_orphans(images: Sequence[Path], remarks: Remarks) -> None:
    """Remarks on label files that no image belongs to, in the folders where the images' label files are."""
    wanted = {find_label_file(path) for path in images}
    for folder in sorted({file.parent for file in wanted if file.parent.is_dir()}):
        for file in sorted(folder.glob("*.txt")):
            if file not in wanted and looks_like_yolo_labels(file):
                remarks.add("missing-image", str(file))


def label_path(image: Path) -> Path:
    """Where the label file of an image goes: in "labels" instead of the last "images" of its path, or beside it."""
    folders = list(image.parent.parts)
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return Path(*folders, image.name).with_suffix(".txt")


def find_label_file(image: Path) -> Path:
    """The label file of an image, whether it exists or not."""
    usual, beside = label_path(image), image.with_suffix(".txt")
    return beside if beside.is_file() and not usual.is_file() else usual


def yolo_lines(image: LabeledImage, class_names: Sequence[str], facts: ImageFacts, exif: Exif, remarks: Remarks) -> str:
    """The label file of an image. Crowds are left out with a remark, as the format has no place for them."""
    displayed = exif != "stored"
    width, height = facts.displayed_size if displayed else (facts.width, facts.height)
    lines = []
    for box in image.boxes:
        if box.crowd:
            remarks.add("crowd-left-out", f"{image.path}: {box.name}")
            continue
        x1, y1, x2, y2 = to_displayed(box.corners, facts) if displayed else box.corners
        values = ((x1 + x2) / (2 * width), (y1 + y2) / (2 * height), (x2 - x1) / width, (y2 - y1) / height)
        fractions = " ".join(f"{value:.{DIGITS}f}".rstrip("0").rstrip(".") for value in values)
        lines.append(f"{class_names.index(box.name)} {fractions}\n")
    if displayed and facts.orientation != 1 and lines:
        remarks.add("exif-mapped", str(image.path))
    return "".join(lines)


def _read_image(
    path: Path, label_file: Path, class_names: Sequence[str], remarks: Remarks, root: Path, exif: Exif
) -> LabeledImage:
    if not path.is_file():
        raise LeftOut("listed-missing", str(path))
    facts = image_facts(path)
    key = Path(os.path.relpath(path, root)).with_suffix("").as_posix()
    image = LabeledImage(key, path, facts.width, facts.height)
    try:
        text = label_file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        remarks.add("no-label-file", f"{path}: no {label_file}")
        return image
    except (OSError, UnicodeDecodeError) as error:
        raise LeftOut("faulty-line", f"{label_file}: {error}") from None
    displayed = exif != "stored"
    size = facts.displayed_size if displayed else (facts.width, facts.height)
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            place = f"{label_file}, line {number}"
            try:
                name, corners, ring = _parse_line(line, place, class_names, size, remarks)
            except LeftOut as reason:
                remarks.leave_out(reason)
                continue
            if displayed:
                corners = to_stored(corners, facts)
                ring = ring_to_stored(ring, facts)
            fitted = fit_box(corners, facts.width, facts.height, remarks, place)
            if fitted is None:
                continue
            x1, y1, x2, y2 = rounded(fitted)
            if x1 < x2 and y1 < y2:
                rings = (rounded(ring),) if ring else ()
                add_box(image, LabeledBox(name, (x1, y1, x2, y2), rings=rings), remarks, place)
            else:
                remarks.add("box-dropped", f"{place}: thinner than a hundredth of a pixel")
    if displayed and facts.orientation != 1 and image.boxes:
        remarks.add("exif-mapped", str(path))
    if not image.boxes:
        remarks.add("empty", str(label_file))
    return image


def _parse_line(
    line: str, place: str, class_names: Sequence[str], size: tuple[int, int], remarks: Remarks
) -> tuple[str, Corners, Ring]:
    """Class, corners and polygon (empty where it is a box) in pixels of one line, unclipped. Raises LeftOut where it is
    none.

    size: width and height that the fractions are of.
    """
    width, height = size
    words = line.split()
    try:
        numbers = [Decimal(word) for word in words]
    except InvalidOperation:
        raise LeftOut("faulty-line", f"{place}: {line.strip()[:60]!r}") from None
    is_polygon = len(numbers) >= 7 and len(numbers) % 2 == 1
    if not (len(numbers) == 5 or is_polygon) or not all(number.is_finite() for number in numbers):
        reason = ", a prediction with its score?" if len(numbers) == 6 else ""
        raise LeftOut("faulty-line", f"{place}: {line.strip()[:60]!r}{reason}")
    index, *values = numbers
    if not 0 <= index < len(class_names) or index != int(index):
        last = len(class_names) - 1
        raise LeftOut("unknown-class", f"{place}: class {words[0]}, and the class list goes from 0 to {last}")
    if not all(-MAX_FRACTION <= value <= MAX_FRACTION for value in values):  # abs fails on 1e99999999
        raise LeftOut("not-fractions", f"{place}: {line.strip()[:60]!r}")
    ring: Ring = ()
    if is_polygon:
        remarks.add("polygon", place)
        ring = tuple(value * (height if number % 2 else width) for number, value in enumerate(values))
        corners = box_of_rings([ring])
    else:
        x, y, w, h = values[0] * width, values[1] * height, values[2] * width, values[3] * height
        if w <= 0 or h <= 0:
            raise LeftOut("box-dropped", f"{place}: width {words[3]}, height {words[4]}")
        corners = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    return class_names[int(index)], corners, ring


def _find_settings(root: Path) -> Path:
    names = ["data.yaml", "data.yml", "dataset.yaml", "dataset.yml", "obj.data"]
    found = [root / name for name in names if (root / name).is_file()]
    yamls = sorted(path for path in root.iterdir() if path.suffix.lower() in (".yaml", ".yml"))
    if not found and len(yamls) > 1:
        raise ConversionError(f"{root}: holds several settings, {', '.join(p.name for p in yamls)}. Give --data FILE")
    found += yamls
    folders = [root, root / "labels", *(root / name for name in SPLIT_OF_FOLDER)]  # Roboflow's darknet has one a split
    found += [folder / name for folder in folders for name in CLASS_FILES if (folder / name).is_file()]
    if not found:
        raise ConversionError(
            f"{root}: no data.yaml, obj.data or classes.txt there. Write the class names into classes.txt, one a line, "
            "in the order of their numbers; scripts/convert_yolo.py also takes them from elsewhere (--classes FILE)"
        )
    return found[0]


def _images_of(root: Path, settings: YoloSettings, split: str) -> list[Path] | None:
    """The images of a split: of folders (with subfolders), patterns, and lists of images.

    None where a folder or list is missing that the programs name whether they write it or not.
    """
    found: list[Path] = []
    for written in settings.splits[split]:
        source = _locate(root, settings, written)
        if source is None:
            # Often written down and not shipped: test sets, CVAT's lists, and Roboflow's folders of empty splits.
            if split == "test" or settings.source.suffix == ".data" or written in ROBOFLOW_FOLDERS:
                return None
            raise ConversionError(
                f"{settings.source}: {split} is {written!r}, and there is no such folder or list (searched from "
                f"{settings.source.parent}). Correct it, or delete the line and give --val-fraction"
            )
        if source.is_dir():
            found += walk(source, IMAGE_SUFFIXES)
        elif source.suffix.lower() == ".txt":
            lines = source.read_text(encoding="utf-8-sig").splitlines()
            bases = (source.parent, source.parent.parent)
            for line in (line.strip() for line in lines):
                if line:
                    places = [base / text for text in _spellings(line) for base in bases] + [Path(line)]
                    found.append(_plain(next((place for place in places if place.is_file()), places[0])))
        else:
            found += [_plain(Path(match)) for match in sorted(glob.glob(str(source)))]  # noqa: PTH207
    return list(dict.fromkeys(found))


def _locate(root: Path, settings: YoloSettings, written: str) -> Path | None:
    here = settings.source.parent
    bases = [here / settings.path, Path(settings.path)] if settings.path is not None else []
    bases += [here, root, here.parent]
    for text in _spellings(written):
        for base in bases:
            place = base / text
            if place.exists() or glob.glob(str(place)):  # noqa: PTH207
                return _plain(place)
    return None


def _spellings(written: str) -> list[str]:
    # Roboflow writes ../train/images, and CVAT data/train.txt, for what lies beside the file.
    return list(dict.fromkeys((written, written.removeprefix("../"), written.removeprefix("data/"))))


def _plain(path: Path) -> Path:
    """Without '..' in it, links left as they are."""
    return Path(os.path.normpath(path))
