"""XML from strangers to a tree, without document types or entities, which can blow up memory or name files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from data.errors import DataError


class XmlError(DataError):
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
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.UnparsedEntityDeclHandler = refuse
    parser.ExternalEntityRefHandler = refuse
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
