"""Which layout a folder has, by the files in it."""

from __future__ import annotations

import json
import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.convert.files import looks_like_yolo_labels
from data.convert.labelme import is_labelme
from data.convert.splits import SPLIT_OF_FOLDER
from data.convert.yolo_config import CLASS_FILES
from data.errors import DataError
from data.images.files import IMAGE_SUFFIXES, walk

ROBOFLOW_FILE = "_annotations.coco.json"
CONTAINERS = {"images", "labels", "annotations", "data", "jpegimages", "vocdevkit", *SPLIT_OF_FOLDER}
"""Folders that belong to a layout, in lower case: a folder that holds nothing else is not looked through."""
MOST_FILES = 20  # annotation files of a folder; more are one an image, as some programs write them
NUM_LOOKED_INTO = 5
NOT_FOR_BOXES = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")

FORMATS = {
    "coco": "COCO JSON",
    "yolo": "YOLO",
    "voc": "Pascal VOC",
    "imagefolder": "Hugging Face's imagefolder",
    "labelme": "LabelMe",
}
"""Values of --data-format, and what they are called."""
CONVERTERS = {"yolo": "scripts/convert_yolo.py", "voc": "scripts/convert_voc.py"}
OTHER_TOOLS = {
    "_annotations.csv": "a table of boxes (Roboflow's CSV)",
    "_annotations.createml.json": "CreateML",
    "via_region_data.json": "VGG Image Annotator",
    "metadata.csv": "an imagefolder without boxes, which only metadata.jsonl can hold",
}
"""Files of layouts that cannot be read."""


class LayoutError(DataError):
    """A folder of no layout known here, or of several at once. The message says what was found and what to give."""


@dataclass(frozen=True)
class Reading:
    """One way to read a folder."""

    format: str
    """A key of FORMATS."""
    evidence: Path
    """A file that speaks for it."""


def inner_folder(root: Path) -> Path:
    """The folder that holds the set: `root`, or the only folder in it, as unpacking an archive leaves it."""
    while True:
        entries = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith((".", "__MACOSX"))]
        is_wrapper = len(entries) == 1 and entries[0].is_dir() and entries[0].name.lower() not in CONTAINERS
        if not is_wrapper:
            return root
        root = entries[0]


def recognize(root: Path, data_format: str | None = None) -> Reading:
    """The only reading of the folder.

    Raises LayoutError where there is none, or several and `data_format` does not say which.
    """
    if not root.is_dir():
        raise LayoutError(f"{root}: there is no such folder. Give --data-path the folder of the set")
    files = walk(root, None)
    found = readings(root, files)
    if data_format is not None:
        found = [reading for reading in found if reading.format == data_format]
    if len(found) == 1:
        return found[0]
    if found:
        lines = [f"{root} can be read in {len(found)} ways. Say which:"]
        lines += [
            f"  --data-format {reading.format:<12} {FORMATS[reading.format]}, by {reading.evidence}"
            for reading in found
        ]
        raise LayoutError("\n".join(lines))
    raise LayoutError(_nothing_known(root, files, data_format))


def readings(root: Path, files: Sequence[Path]) -> list[Reading]:
    """Every format that the files speak for."""
    found = []
    if (coco := coco_files(root, files)) != []:
        found.append(Reading("coco", coco[0]))
    if (yolo := _yolo_evidence(root, files)) is not None:
        found.append(Reading("yolo", yolo))
    xml = [file for file in files if file.suffix.lower() == ".xml"]
    if voc := [file for file in xml[:NUM_LOOKED_INTO] if b"<annotation" in _head(file)]:
        found.append(Reading("voc", voc[0]))
    shapes = [file for file in files if file.suffix.lower() == ".json"]
    if labelme := [file for file in shapes[:NUM_LOOKED_INTO] if is_labelme(file)]:
        found.append(Reading("labelme", labelme[0]))
    metadata = [file for file in files if file.name == "metadata.jsonl"]
    if imagefolder := [file for file in metadata if _has_objects(file)]:
        found.append(Reading("imagefolder", imagefolder[0]))
    return found


def coco_files(root: Path, files: Sequence[Path] | None = None) -> list[Path]:
    """The COCO annotation files with boxes below a folder, sorted."""
    files = walk(root, None) if files is None else files
    by_folder: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix.lower() == ".json":
            by_folder.setdefault(file.parent, []).append(file)
    found = []
    for inside in by_folder.values():
        if any(file.name.startswith("instances_") for file in inside):
            inside = [file for file in inside if not file.name.startswith(NOT_FOR_BOXES)]
        if len(inside) <= MOST_FILES:
            found += [file for file in inside if _is_coco(file)]
    return sorted(found)


def other_tool(root: Path, data_format: str) -> str:
    """What to say to someone who has given a folder of another format to the reader of this one; "" where it is not."""
    if not root.is_dir():
        return ""
    found = readings(root, walk(root, None))
    if not found or any(reading.format == data_format for reading in found):
        return ""
    names = " and ".join(f"{FORMATS[reading.format]} ({reading.evidence})" for reading in found)
    converters = [CONVERTERS[reading.format] for reading in found if reading.format in CONVERTERS]
    remedy = f"give it to {' or '.join(converters)}" if converters else "it needs no conversion"
    return f"\nThe folder seems to be of {names}: {remedy}, or train on it as it is: train.py --data-path {root}"


def _yolo_evidence(root: Path, files: Sequence[Path]) -> Path | None:
    settings = [file for file in files if file.parent == root and file.suffix.lower() in (".yaml", ".yml", ".data")]
    for file in settings:
        if any(line.startswith(b"names") for line in _head(file, 1 << 20).splitlines()):
            return file
    texts = [
        file
        for file in files
        if file.suffix.lower() == ".txt" and file.name not in CLASS_FILES and not file.name.startswith("README")
    ]
    # Lists of images lie beside the folders; label files are the many.
    per_folder = Counter(file.parent for file in texts)
    texts.sort(key=lambda file: -per_folder[file.parent])
    return next((file for file in texts[:NUM_LOOKED_INTO] if looks_like_yolo_labels(file)), None)


def _is_coco(file: Path) -> bool:
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b'"images"') >= 0 and content.find(b'"categories"') >= 0
    except (OSError, ValueError):  # mmap's word for an empty file
        return False


def _has_objects(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8") as lines:
            return "objects" in json.loads(next(lines, "{}"))
    except (OSError, ValueError, TypeError):
        return False


def _head(file: Path, size: int = 1000) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(size)
    except OSError:
        return b""


def _nothing_known(root: Path, files: Sequence[Path], data_format: str | None) -> str:
    suffixes = Counter(file.suffix.lower() or "(no suffix)" for file in files)
    held = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common(6)) or "no files"
    asked = "a data set that can be read" if data_format is None else f"{FORMATS[data_format]} (--data-format)"
    lines = [f"{root}: nothing there is {asked}. It holds {held}."]
    lines += [f"  {name} is {text}: export it as COCO or YOLO" for name, text in OTHER_TOOLS.items()
              if any(file.name == name for file in files)]  # fmt: skip
    if suffixes.keys() & IMAGE_SUFFIXES and len(suffixes.keys() - IMAGE_SUFFIXES) == 0:
        lines.append("  There are images and no labels.")
    if ".parquet" in suffixes:
        lines.append(f"  Parquet files are unpacked first: scripts/pack_dataset.py unpack {root} FOLDER")
    lines += [
        "Read are: COCO's JSON files; YOLO's data.yaml, obj.data or class list with label files; Pascal VOC's XML",
        "files; LabelMe's JSON files; Hugging Face's metadata.jsonl with objects (docs/own_data.md has the table).",
        "Or name the files:",
        "  --train-images DIR --train-annotations FILE --val-images DIR --val-annotations FILE",
    ]
    return "\n".join(lines)
