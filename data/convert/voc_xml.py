"""Pascal VOC's XML: written, and read from strangers without document types or entities, which can blow up memory or
name files.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NoReturn
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement, TreeBuilder
from xml.parsers import expat

from data.convert.conversion import ConversionError, LabeledImage

Coordinates = Literal["one-based", "zero-based"]

NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


class XmlError(ConversionError):
    """A file that is no XML, or XML that is refused; the message names file and line."""


class LocatedElement(Element):
    """An element that knows the line it begins in."""

    line: int = 0


def parse_xml(path: Path) -> LocatedElement:
    """The root element of a file. Raises XmlError."""
    parser = expat.ParserCreate()
    builder = TreeBuilder(element_factory=LocatedElement)

    def begin(tag: str, attributes: dict[str, str]) -> None:
        element = builder.start(tag, attributes)
        assert isinstance(element, LocatedElement)
        element.line = parser.CurrentLineNumber

    def refuse(*_: Any) -> NoReturn:
        raise XmlError(
            f"{path}, line {parser.CurrentLineNumber}: holds a document type or an entity, which annotations do not "
            "need and which is refused for safety. Delete that part"
        )

    parser.StartElementHandler = begin
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse  # entities can be declared nowhere else
    parser.buffer_text = True
    try:
        parser.Parse(path.read_bytes(), True)
        root = builder.close()
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise XmlError(f"{path}, line {error.lineno}, column {error.offset + 1}: not XML: {reason}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, XmlError):
            raise
        raise XmlError(f"{path}: cannot be read: {error}") from None
    assert isinstance(root, LocatedElement)
    return root


def voc_xml(
    image: LabeledImage, file_name: str, *, coordinates: Coordinates = "one-based", whole_pixels: bool = False
) -> bytes:
    """The XML file of one image, crowds as difficult.

    coordinates: see the head of voc.py. whole_pixels: rounds corners to whole numbers, for readers that take
    nothing else; fractions are kept otherwise.

    Raises ConversionError for a name that XML cannot hold.
    """
    root = Element("annotation")
    folder, _, base = file_name.rpartition("/")
    SubElement(root, "folder").text = folder or "JPEGImages"
    SubElement(root, "filename").text = base
    convention = "PASCAL VOC convention" if coordinates == "one-based" else "Unknown"
    SubElement(SubElement(root, "source"), "database").text = convention
    size = SubElement(root, "size")
    for side, pixels in (("width", image.width), ("height", image.height), ("depth", 3)):
        SubElement(size, side).text = str(pixels)
    SubElement(root, "segmented").text = "0"
    for box in image.boxes:
        element = SubElement(root, "object")
        for tag, text in (("name", box.name), ("pose", "Unspecified"), ("truncated", "0")):
            SubElement(element, tag).text = text
        SubElement(element, "difficult").text = str(int(box.crowd))
        bounds = SubElement(element, "bndbox")
        x1, y1, x2, y2 = box.corners
        if whole_pixels:
            # A box thinner than a pixel keeps one.
            x1, y1 = min(round(x1), image.width - 1) * Decimal(1), min(round(y1), image.height - 1) * Decimal(1)
            x2, y2 = max(Decimal(round(x2)), x1 + 1), max(Decimal(round(y2)), y1 + 1)
        first = 1 if coordinates == "one-based" else 0
        for side, value in (("xmin", x1 + first), ("ymin", y1 + first), ("xmax", x2), ("ymax", y2)):
            SubElement(bounds, side).text = plain_decimal(value)
    for text in (file_name, *(box.name for box in image.boxes)):
        if NOT_IN_XML.search(text):
            raise ConversionError(f"{image.path}: {text!r} holds a character that XML cannot. Rename it")
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def plain_decimal(value: Decimal) -> str:
    """Digits without exponent and without zeros that say nothing: 68, 12.5."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
