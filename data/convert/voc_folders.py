"""Where a folder of Pascal VOC's files keeps its XML files, images, lists and class names."""

import os
from dataclasses import dataclass
from pathlib import Path

from data.convert.conversion import ConversionError

XML_FOLDERS = ("Annotations", "annotations")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "JPEGimages")
CLASS_FILES = ("classes.txt", "labels.txt", "labelmap.txt")


@dataclass(frozen=True)
class VocFolders:
    """Where XML files and images lie."""

    xml: Path
    images: Path
    classes: Path | None
    """A file of class names, where the folder has one."""
    sets: dict[str, Path]
    """Lists of ImageSets/Main by split: train and val, and test where there is one; empty without the two."""


def find_voc(root: Path, *, xml: Path | None = None, images: Path | None = None) -> VocFolders:
    """The layout of VOC's devkit (Annotations, JPEGImages, ImageSets/Main), or any folder with XML files in it.

    Raises ConversionError where a folder does not exist.
    """
    for folder in (root, xml, images):
        if folder is not None and not folder.is_dir():
            raise ConversionError(f"{folder}: there is no such folder. Give the one that holds the Pascal VOC files")
    nested = root / "VOCdevkit"
    years = sorted((nested if nested.is_dir() else root).glob("VOC20[0-9][0-9]"))
    if xml is None and not any((root / name).is_dir() for name in XML_FOLDERS) and years:
        raise ConversionError(f"{root}: holds {', '.join(map(str, years))}. Give one of these folders")
    # A folder "annotations" may also hold the JSON files of an earlier conversion.
    chosen_xml = xml or next((root / name for name in XML_FOLDERS if xml_files(root / name)), root)
    chosen_images = images or next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), root)
    sets = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val", "test")}
    sets = {split: file for split, file in sets.items() if file.is_file()}
    classes = next((root / name for name in CLASS_FILES if (root / name).is_file()), None)
    return VocFolders(chosen_xml, chosen_images, classes, sets if {"train", "val"} <= sets.keys() else {})


def read_class_file(file: Path) -> list[str]:
    """Class names, one a line; of CVAT's labelmap.txt ("name:color:parts:actions") the names but background.

    Raises ConversionError for a file that cannot be read, is empty, or names a class twice.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{file}: cannot be read: {error}. Give a text file with a class name a line") from None
    names = [line.strip() for line in lines]
    if any(line.startswith("# label:") for line in names):
        names = [line.split(":")[0] for line in names if not line.startswith("#")]
        names = [name for name in names if name != "background"]
    while names and not names[-1]:
        names.pop()
    for number, name in enumerate(names, 1):
        if not name:
            raise ConversionError(f"{file}, line {number}: is empty, and classes count by line. Delete the line")
        if name in names[: number - 1]:
            raise ConversionError(f"{file}, line {number}: {name!r} is named twice. Delete one")
    if not names:
        raise ConversionError(f"{file}: names no class. Write one name a line")
    return names


def xml_files(folder: Path) -> list[Path]:
    """XML files below a folder, sorted, hidden ones and a Mac's shadow files left out."""
    return sorted(walk(folder, {".xml"}))


def walk(folder: Path, suffixes: set[str]) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return [path for path in found if path.suffix.lower() in suffixes]
