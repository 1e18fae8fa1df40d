"""Pascal VOC's XML files, read and written.

Coordinates. VOC counts pixels from 1 and includes the last one (devkit_doc.pdf of VOC2007, "bounding box"): the box
covers the pixels xmin to xmax. In COCO's terms, where edges are counted from 0, that is x = xmin - 1 and
width = xmax - xmin + 1. The labeling programs that write the same XML mostly store edges counted from 0 instead: x =
xmin, width = xmax - xmin (LabelImg, which lifts an xmin of 0 to 1; Datumaro, and with it CVAT). The files do not say
which, but for one thing: the sets of the VOC challenge name themselves under <source><database> ("The
VOC2007 Database"), and the programs write "Unknown" or their own name there. "auto" goes by that, file by file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from data.coco.findings import Severity
from data.convert.conversion import (
    SHARED_TEXTS,
    ConversionError,
    Corners,
    Exif,
    ImageFacts,
    LabeledBox,
    LabeledImage,
    Remarks,
    add_box,
    describe,
    fit_box,
    image_facts,
    nearest,
    to_stored,
)
from data.convert.voc_folders import VocFolders, walk, xml_files
from data.convert.voc_xml import LocatedElement, XmlError, parse_xml
from data.images.decode import ImageError
from data.images.files import IMAGE_SUFFIXES

Coordinates = Literal["one-based", "zero-based"]
Difficult = Literal["ignore", "keep", "drop"]

NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

VOC_TEXTS: dict[str, tuple[Severity, str]] = {
    "malformed-xml": ("error", "files cannot be read as XML. Mend them, or export them again"),
    "faulty-object": ("error", "objects lack a name or a box of four numbers. Mend or delete the object"),
    "missing-image": ("error", "the image of an XML file is missing. Add it, delete the XML, or give --images DIR"),
    "ambiguous-image": (
        "error",
        "an XML file fits several images. Make <filename> the image's name, and names unique",
    ),
    "image-twice": ("error", "an image is described by two XML files. Delete one, or join the two"),
    "size-differs": (
        "error",
        "images have another size than their XML says, so the boxes are misplaced. Use the images that were "
        "annotated, or scale the boxes",
    ),
    **SHARED_TEXTS,
    "no-size": ("warning", "XML files give no size, or one of 0; the image's own was taken"),
    "corners-swapped": ("warning", "boxes had minimum and maximum exchanged, and were put right"),
    "image-renamed": ("warning", "<filename> names no image; the one of the XML's own name was taken"),
    "not-annotation": ("warning", "XML files are no annotations (their root is not <annotation>) and were passed over"),
    "image-without-xml": ("warning", "images have no XML file and were left out. Label them, or remove them"),
    "difficult": ("info", "objects are marked difficult; see --difficult"),
}


@dataclass
class VocSet:
    """What was read."""

    images: list[LabeledImage] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    """Keys of XML files that could not be used."""
    coordinates: Counter[str] = field(default_factory=Counter)
    """Files by the convention that their boxes were read with."""


def read_voc(
    folders: VocFolders,
    remarks: Remarks,
    *,
    classes: Sequence[str] | None = None,
    coordinates: Literal["auto", "one-based", "zero-based"] = "auto",
    difficult: Difficult = "ignore",
    exif: Exif = "auto",
    progress: Callable[[int], object] | None = None,
) -> VocSet:
    """Every image with an XML file, in the order of the XML files' names.

    classes: names that are allowed; None allows all. difficult: "ignore" makes such objects crowds, "keep" makes them
    like the others, "drop" leaves them out. exif: which way up the boxes were drawn; "auto" tells by the size in the
    XML where that can tell. remarks: made of VOC_TEXTS; an image with an error is left out.

    Raises ConversionError where there is no XML file at all.
    """
    reader = _Reader(folders, remarks, classes, coordinates, difficult, exif)
    files = xml_files(folders.xml)
    if not files:
        raise ConversionError(f"{folders.xml}: no XML files there. Give the folder that holds them (--xml DIR)")
    for file in files:
        reader.read(file)
        if progress is not None:
            progress(1)
    reader.finish()
    return reader.result


class _Reader:
    def __init__(
        self,
        folders: VocFolders,
        remarks: Remarks,
        classes: Sequence[str] | None,
        coordinates: str,
        difficult: Difficult,
        exif: Exif,
    ) -> None:
        self.folders = folders
        self.remarks = remarks
        self.classes = None if classes is None else set(classes)
        self.coordinates = coordinates
        self.difficult = difficult
        self.exif = exif
        self.result = VocSet()
        self._images = sorted(walk(folders.images, IMAGE_SUFFIXES))
        self._known = set(self._images)
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for path in self._images:
            self._by_name.setdefault(path.name, []).append(path)
            self._by_stem.setdefault(path.stem, []).append(path)
        self._described: dict[Path, Path] = {}

    def read(self, file: Path) -> None:
        key = file.relative_to(self.folders.xml).with_suffix("").as_posix()
        errors = self.remarks.num_errors
        image = self._image(file, key)
        if image is not None and self.remarks.num_errors == errors:
            self.result.images.append(image)
            if not image.boxes:
                self.remarks.add("empty", str(file))
        else:
            self.result.left_out.add(key)

    def finish(self) -> None:
        for path in self._images:
            if path not in self._described:
                self.remarks.add("image-without-xml", str(path))

    def _image(self, file: Path, key: str) -> LabeledImage | None:
        try:
            root = parse_xml(file)
        except XmlError as error:
            self.remarks.add("malformed-xml", str(error))
            for namesake in self._by_stem.get(file.stem, []):  # it has an XML file, only not one to read
                self._described.setdefault(namesake, file)
            return None
        if root.tag != "annotation":
            self.remarks.add("not-annotation", f"{file}: <{root.tag[:40]}>")
            return None
        path = self._path(file, key, _text(root, "filename"))
        if path is None:
            return None
        if path in self._described:
            self.remarks.add("image-twice", f"{path}: {self._described[path]} and {file}")
            return None
        self._described[path] = file
        try:
            facts = image_facts(path)
        except ImageError as error:
            self.remarks.add("unreadable-image", str(error))
            return None
        displayed = self._is_displayed(file, root, facts)
        if displayed is None:
            return None
        one_based = self.coordinates == "one-based" or (self.coordinates == "auto" and _is_of_voc(root))
        self.result.coordinates["one-based" if one_based else "zero-based"] += 1

        image = LabeledImage(key, path, facts.width, facts.height)
        objects = [element for element in root if element.tag == "object"]
        for number, element in enumerate(objects, 1):
            assert isinstance(element, LocatedElement)
            self._object(image, element, f"{file}, line {element.line}, object {number}", facts, displayed, one_based)
        return image

    def _object(
        self,
        image: LabeledImage,
        element: LocatedElement,
        place: str,
        facts: ImageFacts,
        displayed: bool,
        one_based: bool,
    ) -> None:
        name = _text(element, "name")
        if not name:
            self.remarks.add("faulty-object", f"{place}: no <name>")
            return
        box = element.find("bndbox")
        if box is None:
            self.remarks.add("faulty-object", f"{place} ({name}): no <bndbox>")
            return
        values = []
        for side in ("xmin", "ymin", "xmax", "ymax"):
            text = _text(box, side)
            try:
                value = Decimal(text)
            except InvalidOperation:
                value = Decimal("NaN")
            if not value.is_finite() or abs(value) > 10**9:
                shown = f"<{side}> is {text[:40]!r}" if text else f"no <{side}>"
                self.remarks.add("faulty-object", f"{place} ({name}): {shown}")
                return
            values.append(value)
        if self.classes is not None and name not in self.classes:
            self.remarks.add("unknown-class", f"{place}: {name!r}{nearest(name, self.classes)}")
            return
        is_difficult = _text(element, "difficult").lower() in ("1", "true", "yes")
        if is_difficult:
            self.remarks.add("difficult", place)
            if self.difficult == "drop":
                return
        x1, y1, x2, y2 = values
        if x1 > x2 or y1 > y2:
            self.remarks.add("corners-swapped", f"{place} ({name}): {describe((x1, y1, x2, y2))}")
            x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        corners: Corners = (x1 - 1, y1 - 1, x2, y2) if one_based else (x1, y1, x2, y2)
        if displayed:
            corners = to_stored(corners, facts)
        fitted = fit_box(corners, facts.width, facts.height, self.remarks, f"{place} ({name})")
        if fitted is not None:
            crowd = is_difficult and self.difficult == "ignore"
            add_box(image, LabeledBox(name, fitted, crowd), self.remarks, place)

    def _path(self, file: Path, key: str, named: str) -> Path | None:
        """The image of an XML file: by <filename> or by the XML's own name, beside it before anywhere else."""
        named = named.replace("\\", "/").rsplit("/", 1)[-1]
        folders = list(dict.fromkeys((self.folders.images / Path(key).parent, file.parent)))
        by_name = [folder / named for folder in folders if folder / named in self._known] if named else []
        if not by_name:
            by_name = self._by_name.get(named, [])
        stem = Path(key).name
        by_stem = [path for path in self._by_stem.get(stem, []) if path.parent in folders]
        if not by_stem:
            by_stem = self._by_stem.get(stem, [])
        found = by_name[:1] if by_name and by_name[0].parent in folders else by_name
        if found and by_stem and not set(found) & set(by_stem):
            self.remarks.add("ambiguous-image", f"{file}: <filename> is {found[0].name}, and there is {by_stem[0]}")
            return None
        if not found and len(by_stem) == 1:
            # A <filename> without suffix is usual; any other was right once, before the image was renamed.
            if named and Path(named).stem != stem and named != stem:
                self.remarks.add("image-renamed", f"{file}: {named!r}, took {by_stem[0].name}")
            return by_stem[0]
        if len(found) == 1:
            return found[0]
        several = found or by_stem
        if several:
            self.remarks.add("ambiguous-image", f"{file}: {', '.join(map(str, several[:3]))}")
        else:
            self.remarks.add("missing-image", f"{file}: {named or stem!r} is not under {self.folders.images}")
        return None

    def _is_displayed(self, file: Path, root: LocatedElement, facts: ImageFacts) -> bool | None:
        """Whether the boxes refer to the image as EXIF turns it; None where the sizes differ."""
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
            self.remarks.add("size-differs", text)
            return None
        elif stored == facts.displayed_size:
            displayed = self.exif == "displayed"
        else:
            displayed = said != stored
            if self.exif != "auto" and displayed != (self.exif == "displayed"):
                text = f"{file}: says {said[0]}x{said[1]}, which is not the image as {self.exif} (--exif auto takes it)"
                self.remarks.add("size-differs", text)
                return None
        if turned and displayed:
            self.remarks.add("exif-mapped", str(file))
        elif turned and self.exif == "auto" and (stored == facts.displayed_size or said[0] <= 0):
            self.remarks.add("exif-turned", f"{file}: orientation {facts.orientation}, taken as stored")
        return displayed


def voc_xml(
    image: LabeledImage, file_name: str, *, coordinates: Coordinates = "one-based", whole_pixels: bool = False
) -> bytes:
    """The XML file of one image, crowds as difficult.

    coordinates: see the head of this file. whole_pixels: rounds corners to whole numbers, for readers that take
    nothing else; fractions are kept otherwise.

    Raises ConversionError for a name that XML cannot hold.
    """
    root = ElementTree.Element("annotation")
    folder, _, base = file_name.rpartition("/")
    ElementTree.SubElement(root, "folder").text = folder or "JPEGImages"
    ElementTree.SubElement(root, "filename").text = base
    convention = "PASCAL VOC convention" if coordinates == "one-based" else "Unknown"
    ElementTree.SubElement(ElementTree.SubElement(root, "source"), "database").text = convention
    size = ElementTree.SubElement(root, "size")
    for side, pixels in (("width", image.width), ("height", image.height), ("depth", 3)):
        ElementTree.SubElement(size, side).text = str(pixels)
    ElementTree.SubElement(root, "segmented").text = "0"
    for box in image.boxes:
        element = ElementTree.SubElement(root, "object")
        for tag, text in (("name", box.name), ("pose", "Unspecified"), ("truncated", "0")):
            ElementTree.SubElement(element, tag).text = text
        ElementTree.SubElement(element, "difficult").text = str(int(box.crowd))
        bounds = ElementTree.SubElement(element, "bndbox")
        x1, y1, x2, y2 = box.corners
        if whole_pixels:
            # A box thinner than a pixel keeps one.
            x1, y1 = min(round(x1), image.width - 1) * Decimal(1), min(round(y1), image.height - 1) * Decimal(1)
            x2, y2 = max(Decimal(round(x2)), x1 + 1), max(Decimal(round(y2)), y1 + 1)
        first = 1 if coordinates == "one-based" else 0
        for side, value in (("xmin", x1 + first), ("ymin", y1 + first), ("xmax", x2), ("ymax", y2)):
            ElementTree.SubElement(bounds, side).text = plain_decimal(value)
    for text in (file_name, *(box.name for box in image.boxes)):
        if NOT_IN_XML.search(text):
            raise ConversionError(f"{image.path}: {text!r} holds a character that XML cannot. Rename it")
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def plain_decimal(value: Decimal) -> str:
    """Digits without exponent and without zeros that say nothing: 68, 12.5."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _is_of_voc(root: ElementTree.Element) -> bool:
    return "voc" in _text(root, "source/database").lower()
