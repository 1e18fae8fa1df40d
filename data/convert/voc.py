"""Pascal VOC's XML files, read and written.

Coordinates. VOC counts pixels from 1 and includes the last one (devkit_doc.pdf of VOC2007, "bounding box"): the box
covers the pixels xmin to xmax. In COCO's terms, where edges are counted from 0, that is x = xmin - 1 and
width = xmax - xmin + 1. The labeling programs that write the same XML mostly store edges counted from 0 instead: x =
xmin, width = xmax - xmin (LabelImg, which lifts an xmin of 0 to 1; Datumaro, and with it CVAT). The files do not say
which, but for one thing: the sets of the VOC challenge name themselves under <source><database> ("The
VOC2007 Database"), and the programs write "Unknown" or their own name there. "auto" goes by that, file by file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element

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
    add_box,
    derived_classes,
    describe,
    fit_box,
    image_facts,
    nearest,
    to_stored,
)
from data.convert.labeled_set import LabeledSet
from data.convert.splits import split_by_lists, split_of_path
from data.convert.voc_xml import XmlError, parse_xml
from data.images.files import IMAGE_SUFFIXES, walk

XML_FOLDERS = ("Annotations", "annotations")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "JPEGimages")
CLASS_FILES = ("classes.txt", "labels.txt", "labelmap.txt")

VOC_TEXTS = {
    "malformed-xml": "error: files cannot be read as XML. Mend them, or export them again",
    "faulty-object": "error: objects lack a name or a box of four numbers. Mend or delete the object",
    "missing-image": "error: the image of an XML file is missing. Add it, delete the XML, or give --images DIR",
    "ambiguous-image": "error: an XML file fits several images. Make <filename> the image's name, and names unique",
    "image-twice": "error: an image is described by two XML files. Delete one, or join the two",
    "size-differs": "error: images have another size than their XML says, so the boxes are misplaced. Use the images "
    "that were annotated, or scale the boxes",
    **SHARED_TEXTS,
    "no-size": "warning: XML files give no size, or one of 0; the image's own was taken",
    "corners-swapped": "warning: boxes had minimum and maximum exchanged, and were put right",
    "image-renamed": "warning: <filename> names no image; the one of the XML's own name was taken",
    "not-annotation": "warning: XML files are no annotations (their root is not <annotation>) and were passed over",
    "image-without-xml": "warning: images have no XML file and were left out. Label them, or remove them",
    "difficult": "info: objects are marked difficult; see --difficult",
}


@dataclass(frozen=True)
class VocFolders:
    """Where XML files and images lie."""

    root: Path
    xml: Path
    images: Path
    classes: Path | None
    """A file of class names, where the folder has one."""
    sets: dict[str, Path]
    """Lists of ImageSets/Main by split: train, val and test; empty where there is nothing to validate on."""


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
    chosen_xml = xml or next((root / name for name in XML_FOLDERS if walk(root / name, {".xml"})), root)
    chosen_images = images or next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), root)
    lists = root / "ImageSets" / "Main"
    sets = {split: lists / f"{split}.txt" for split in ("train", "val", "test")}
    sets = {split: file for split, file in sets.items() if file.is_file()}
    if "train" not in sets and "val" not in sets and (lists / "trainval.txt").is_file():
        sets["train"] = lists / "trainval.txt"
    classes = next((root / name for name in CLASS_FILES if (root / name).is_file()), None)
    return VocFolders(root, chosen_xml, chosen_images, classes, sets if "train" in sets and len(sets) > 1 else {})


@dataclass
class VocSet:
    """What was read."""

    images: list[LabeledImage] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    """Keys of XML files that could not be used."""
    coordinates: Counter[str] = field(default_factory=Counter)
    """Files by the convention that their boxes were read with."""


def voc_set(
    reader: VocReader,
    lists: Mapping[str, Path],
    class_file: Path | None = None,
    *,
    meant: Sequence[str] = (),
    progress: Progress = lambda _: None,
) -> LabeledSet:
    """What the reader reads, by split: those of `lists`, or of folders named train, val or test that images lie in.

    class_file: where the reader's classes are from. meant: classes that are different ones however alike their names.

    Raises ConversionError where there are no XML files, no object, or a list names what is not there.
    """
    folders, found = reader.folders, reader.read(progress)
    names = list(reader.classes) if reader.classes is not None else None
    class_names = derived_classes(found.images, reader.remarks, meant) if names is None else names
    if not class_names and not reader.remarks.num_errors:
        raise ConversionError(f"{folders.xml}: no object in any XML file: there is nothing to train on")
    by_split: dict[str, list[LabeledImage]] = {}
    if lists:
        by_split, unlisted = split_by_lists(found.images, dict(lists), found.left_out)
        origin = ", ".join(str(file) for file in lists.values())
        if unlisted:
            origin += f"; {len(unlisted):,} images are in none of them and were left out, the first {unlisted[0]}"
    else:
        for image in found.images:
            split = split_of_path(image.path, folders.root)
            if split == "all":
                split = split_of_path(folders.xml / image.key, folders.xml)
            by_split.setdefault(split, []).append(image)
        origin = f"the folders of {folders.root}"
    conventions = ", ".join(f"{kind} in {count:,} files" for kind, count in sorted(found.coordinates.items()))
    return LabeledSet(
        by_split,
        origin,
        class_names,
        reader.remarks,
        description=f"converted from the Pascal VOC files of {folders.xml}",
        images_root=folders.images,
        facts={
            "splits": "",
            "classes": f"{len(class_names)} ({'as found, by alphabet' if class_file is None else class_file})",
            "coordinates": f"{conventions} (--coordinates {reader.coordinates})",
        },
    )


@dataclass
class VocReader:
    """Reads every image with an XML file.

    classes: names that are allowed; None allows all. difficult: "ignore" makes such objects crowds, "keep" makes them
    like the others, "drop" leaves them out. exif: which way up the boxes were drawn; "auto" tells by the size in the
    XML where that can tell. remarks: made of VOC_TEXTS; an image with an error is left out.
    """

    folders: VocFolders
    remarks: Remarks
    classes: Sequence[str] | None = None
    coordinates: Literal["auto", "one-based", "zero-based"] = "auto"
    difficult: Literal["ignore", "keep", "drop"] = "ignore"
    exif: Exif = "auto"

    def __post_init__(self) -> None:
        self.result = VocSet()
        self._images = walk(self.folders.images, IMAGE_SUFFIXES)
        self._described: dict[Path, Path] = {}
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for path in self._images:
            self._by_name.setdefault(path.name, []).append(path)
            self._by_stem.setdefault(path.stem, []).append(path)

    def read(self, progress: Progress = lambda _: None) -> VocSet:
        """What the XML files say, in the order of their names. Raises ConversionError where there is none at all."""
        files = walk(self.folders.xml, {".xml"})
        if not files:
            raise ConversionError(
                f"{self.folders.xml}: no XML files there. Give the folder that holds them (--xml DIR)"
            )
        for file in files:
            key = file.relative_to(self.folders.xml).with_suffix("").as_posix()
            errors = self.remarks.num_errors
            image = None
            try:
                image = self._image(file, key)
            except LeftOut as reason:
                self.remarks.leave_out(reason)
            if image is None or self.remarks.num_errors > errors:
                self.result.left_out.add(key)
            else:
                self.result.images.append(image)
                if not image.boxes:
                    self.remarks.add("empty", str(file))
            progress(1)
        for path in self._images:
            if path not in self._described:
                self.remarks.add("image-without-xml", str(path))
        return self.result

    def _image(self, file: Path, key: str) -> LabeledImage:
        try:
            root = parse_xml(file)
        except XmlError as error:
            for namesake in self._by_stem.get(file.stem, []):  # it has an XML file, only not one to read
                self._described.setdefault(namesake, file)
            raise LeftOut("malformed-xml", str(error)) from None
        if root.tag != "annotation":
            raise LeftOut("not-annotation", f"{file}: <{root.tag[:40]}>")
        path = self._path(file, key, _text(root, "filename"))
        if path in self._described:
            raise LeftOut("image-twice", f"{path}: {self._described[path]} and {file}")
        self._described[path] = file
        facts = image_facts(path)
        displayed = self._is_displayed(file, root, facts)
        one_based = self.coordinates == "one-based" or (self.coordinates == "auto" and _is_of_voc(root))
        self.result.coordinates["one-based" if one_based else "zero-based"] += 1

        image = LabeledImage(key, path, facts.width, facts.height)
        for number, element in enumerate(root.findall("object"), 1):
            place = f"{file}, line {getattr(element, 'line', 0)}, object {number}"
            try:
                name, corners, is_difficult = self._object(element, place, one_based)
            except LeftOut as reason:
                self.remarks.leave_out(reason)
                continue
            if displayed:
                corners = to_stored(corners, facts)
            fitted = fit_box(corners, facts.width, facts.height, self.remarks, f"{place} ({name})")
            if fitted is not None:
                crowd = is_difficult and self.difficult == "ignore"
                add_box(image, LabeledBox(name, fitted, crowd), self.remarks, place)
        return image

    def _object(self, element: Element, place: str, one_based: bool) -> tuple[str, Corners, bool]:
        """Class, corners as drawn, and whether the object is marked difficult. Raises LeftOut."""
        name, box = _text(element, "name"), element.find("bndbox")
        if not name or box is None:
            raise LeftOut("faulty-object", f"{place} ({name}): no <bndbox>" if name else f"{place}: no <name>")
        values = []
        for side in ("xmin", "ymin", "xmax", "ymax"):
            text = _text(box, side)
            try:
                value = Decimal(text)
            except InvalidOperation:
                value = Decimal("NaN")
            if not value.is_finite() or abs(value) > 10**9:
                shown = f"<{side}> is {text[:40]!r}" if text else f"no <{side}>"
                raise LeftOut("faulty-object", f"{place} ({name}): {shown}")
            values.append(value)
        if self.classes is not None and name not in self.classes:
            raise LeftOut("unknown-class", f"{place}: {name!r}{nearest(name, self.classes)}")
        is_difficult = _text(element, "difficult").lower() in ("1", "true", "yes")
        if is_difficult and self.difficult == "drop":
            raise LeftOut("difficult", place)
        if is_difficult:
            self.remarks.add("difficult", place)
        x1, y1, x2, y2 = values
        if x1 > x2 or y1 > y2:
            self.remarks.add("corners-swapped", f"{place} ({name}): {describe((x1, y1, x2, y2))}")
            x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        return name, (x1 - 1, y1 - 1, x2, y2) if one_based else (x1, y1, x2, y2), is_difficult

    def _path(self, file: Path, key: str, named: str) -> Path:
        """The image of an XML file: by <filename> or by the XML's own name, beside it before anywhere else."""
        named = named.replace("\\", "/").rsplit("/", 1)[-1]
        stem = Path(key).name
        folders = (self.folders.images / Path(key).parent, file.parent)

        def near(files: list[Path]) -> list[Path]:
            return [path for folder in dict.fromkeys(folders) for path in files if path.parent == folder]

        by_name, by_stem = self._by_name.get(named, []), self._by_stem.get(stem, [])
        found, by_stem = near(by_name)[:1] or by_name, near(by_stem) or by_stem
        if found and by_stem and not set(found) & set(by_stem):
            raise LeftOut("ambiguous-image", f"{file}: <filename> is {found[0].name}, and there is {by_stem[0]}")
        if not found and len(by_stem) == 1:
            # A <filename> without suffix is usual; any other was right once, before the image was renamed.
            if named and Path(named).stem != stem and named != stem:
                self.remarks.add("image-renamed", f"{file}: {named!r}, took {by_stem[0].name}")
            return by_stem[0]
        if len(found) == 1:
            return found[0]
        if several := found or by_stem:
            raise LeftOut("ambiguous-image", f"{file}: {', '.join(map(str, several[:3]))}")
        raise LeftOut("missing-image", f"{file}: {named or stem!r} is not under {self.folders.images}")

    def _is_displayed(self, file: Path, root: Element, facts: ImageFacts) -> bool:
        """Whether the boxes refer to the image as EXIF turns it. Raises LeftOut where the sizes differ."""
        try:
            said = int(float(_text(root, "size/width"))), int(float(_text(root, "size/height")))
        except (ValueError, OverflowError):
            said = (0, 0)
        stored, turned = (facts.width, facts.height), facts.orientation != 1
        if said[0] <= 0 or said[1] <= 0:
            self.remarks.add("no-size", f"{file}: took {stored[0]}x{stored[1]}")
            displayed = self.exif == "displayed"
        elif said not in (stored, facts.displayed_size):
            exchanged = ", sides exchanged" if said == stored[::-1] else ""
            text = f"{file}: says {said[0]}x{said[1]}, the image has {stored[0]}x{stored[1]}{exchanged}"
            raise LeftOut("size-differs", text)
        elif stored == facts.displayed_size:
            displayed = self.exif == "displayed"
        else:
            displayed = said != stored
            if self.exif != "auto" and displayed != (self.exif == "displayed"):
                text = f"{file}: says {said[0]}x{said[1]}, which is not the image as {self.exif} (--exif auto takes it)"
                raise LeftOut("size-differs", text)
        if turned and displayed:
            self.remarks.add("exif-mapped", str(file))
        elif turned and self.exif == "auto" and (stored == facts.displayed_size or said[0] <= 0):
            self.remarks.add("exif-turned", f"{file}: orientation {facts.orientation}, taken as stored")
        return displayed


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _is_of_voc(root: Element) -> bool:
    return "voc" in _text(root, "source/database").lower()
