"""Files of other formats: texts and lists of class names read."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path

from data.convert.conversion import ConversionError


def read_text(file: Path, remedy: str) -> str:
    """The text of a file. Raises ConversionError, with the remedy, where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{file}: cannot be read: {error}. {remedy}") from None


def read_class_file(file: Path) -> list[str]:
    """Class names, one a line; of CVAT's labelmap.txt ("name:color:parts:actions") the names but background.

    Raises ConversionError for a file that cannot be read, is empty, or names a class twice.
    """
    lines = read_text(file, "Give a text file with a class name a line").rstrip().splitlines()
    names = [line.strip() for line in lines]
    if any(line.startswith("# label:") for line in names):
        names = [line.split(":")[0] for line in names if not line.startswith("#")]
        names = [name for name in names if name != "background"]
    return checked_class_names(names, lambda number: f"{file}, line {number + 1}:", file)


def checked_class_names(names: list[str], place: Callable[[int], str], file: Path) -> list[str]:
    """The names. Raises ConversionError where there are none, one is empty, or one is there twice.

    place: says where in `file` the name of this number (from 0) is.
    """
    for number, name in enumerate(names):
        if not name:
            raise ConversionError(f"{place(number)} has no name, and classes count by place. Name it, or delete it")
        if name in names[:number]:
            raise ConversionError(f"{place(number)} {name!r} is named twice. Rename or delete one")
    if not names:
        raise ConversionError(f"{file}: names no class. Write one name a line")
    return names


def looks_like_yolo_labels(file: Path) -> bool:
    """Whether the first line that says something is a class number and four more numbers."""
    try:
        words = next((line.split() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()), [])
        return len(words) >= 5 and all(Decimal(word).is_finite() for word in words[:5])
    except (OSError, UnicodeDecodeError, InvalidOperation):
        return False
