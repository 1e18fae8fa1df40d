"""A COCO JSON file as checked columns: the only code that touches the Python objects of the parser.

Each check runs over a whole column at once (a set of types, a numpy comparison), and only a column that fails
is searched for the record to name. So the checks of 860,000 annotations cost a fraction of what parsing them
costs.
"""

import gc
import json
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np

from data.coco.segmentations import light
from data.errors import DataError

MAX_IMAGE_PIXELS = 178_956_970  # what Pillow is willing to decode (Image.MAX_IMAGE_PIXELS twice)
MAX_IMAGE_SIDE = 1_000_000  # pixels; far beyond what an image file can hold, far below what overflows
MAX_COORDINATE = 1e9  # pixels; float32 and float64 sums of such values stay finite
MAX_AREA = 1e18  # square pixels
_MISSING = object()


class AnnotationError(DataError):
    """An annotation file that cannot be used. One message: file, record, what is wrong, and the remedy."""


class Records:
    """One list of the file ("images", "annotations" or "categories") whose columns are taken out checked."""

    def __init__(self, path: Path, section: str, records: Any) -> None:
        self.path = path
        self.section = section
        if type(records) is not list:
            raise AnnotationError(
                f'{path}: "{section}" is {_kind(records)}, expected a list of objects. '
                "Write the file in the COCO format."
            )
        self._records: list[dict[str, Any]] = records
        if not set(map(type, records)) <= {dict}:
            index = next(i for i, record in enumerate(records) if type(record) is not dict)
            raise AnnotationError(
                f"{path}: {section}[{index}] is {_kind(records[index])}, expected an object. "
                "Write the file in the COCO format."
            )

    def __len__(self) -> int:
        return len(self._records)

    def fail(self, index: int, problem: str, remedy: str) -> NoReturn:
        """Raises the AnnotationError of record `index`."""
        identity = self._records[index].get("id", _MISSING)
        named = "" if identity is _MISSING else f" (id {reprlib.repr(identity)})"
        raise AnnotationError(f"{self.path}: {self.section}[{index}]{named}: {problem}. {remedy}")

    def fail_where(self, bad: np.ndarray, key: str, problem: str, remedy: str) -> None:
        """Fails at the first true entry of `bad` (bool [n]) and says how many there are; does nothing without
        one."""
        if bad.any():
            index = int(np.argmax(bad))
            others = int(bad.sum()) - 1
            more = f" ({others:,} more like it)" if others else ""
            self.fail(index, f'"{key}" is {reprlib.repr(self._records[index].get(key))}, {problem}{more}', remedy)

    def column(self, key: str, types: set[type], expected: str, remedy: str, default: Any = _MISSING) -> list[Any]:
        """The values under `key`, each of one of exactly these types (so bool is not int)."""
        if default is _MISSING:
            try:
                values = [record[key] for record in self._records]
            except KeyError:
                index = next(i for i, record in enumerate(self._records) if key not in record)
                self.fail(index, f'has no "{key}"', remedy)
        else:
            values = [record.get(key, default) for record in self._records]
        found = set(map(type, values))
        if not found <= types:
            index = next(i for i, value in enumerate(values) if type(value) not in types)
            others = sum(type(value) not in types for value in values) - 1
            mixed = f" (the file mixes {_names(found)})" if len(found) > 1 else ""
            mixed += f" ({others:,} more like it)" if others else ""
            shown = f"{reprlib.repr(values[index])}, {_kind(values[index])}"
            self.fail(index, f'"{key}" is {shown}, expected {expected}{mixed}', remedy)
        return values

    def integers(self, key: str) -> np.ndarray:
        """Whole numbers, int64 [n]. Neither text nor 1.0 nor true is taken for one."""
        remedy = f'Write every "{key}" as a JSON integer, the same way in all records that refer to it.'
        values = self.column(key, {int}, "an integer", remedy)
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            index = next(i for i, value in enumerate(values) if not -(2**63) <= value < 2**63)
            self.fail(index, f'"{key}" is {reprlib.repr(values[index])}, beyond 64 bits', remedy)

    def unique_integers(self, key: str) -> np.ndarray:
        """Whole numbers that occur once each, int64 [n]."""
        values = self.integers(key)
        order = np.argsort(values, kind="stable")
        repeated = np.flatnonzero(values[order][1:] == values[order][:-1])
        if len(repeated):
            first, second = int(order[repeated[0]]), int(order[repeated[0] + 1])
            self.fail(
                second,
                f"the {key} is taken by {self.section}[{first}] already"
                + (f" ({len(repeated):,} such records)" if len(repeated) > 1 else ""),
                f"Give every one of the {self.section} an {key} of its own.",
            )
        return values

    def sides(self, key: str) -> np.ndarray:
        """Widths or heights of images in pixels, int64 [n], at least 1; 640.0 counts as 640."""
        remedy = f'Write the "{key}" of the image file in pixels.'
        values = self._floats(key, self.column(key, {int, float}, "a number", remedy), remedy)
        bad = ~((values >= 1) & (values <= MAX_IMAGE_SIDE) & (values == np.floor(values)))
        self.fail_where(bad, key, f"expected a whole number from 1 to {MAX_IMAGE_SIDE:,}", remedy)
        return values.astype(np.int64)

    def flags(self, key: str) -> np.ndarray:
        """bool [n]: 0 or 1, true or false; absent is false."""
        remedy = f'Write "{key}" as 0 or 1, or leave it out.'
        values = self.column(key, {int, bool}, "0 or 1", remedy, default=0)
        return np.array([value != 0 for value in values], dtype=bool)

    def texts(self, key: str) -> list[str]:
        """Non-empty texts that can be encoded and printed."""
        remedy = f'Write a non-empty text under "{key}".'
        values = self.column(key, {str}, "a text", remedy)
        for index, value in enumerate(values):
            if not value.strip() or "\0" in value:
                self.fail(index, f'"{key}" is {reprlib.repr(value)}, empty or with a NUL character', remedy)
        return values

    def file_names(self, key: str) -> list[bytes]:
        """Names of files inside a folder, in UTF-8: neither absolute nor with a way up.

        LVIS has no names. There it is the last two parts of an image's address, as "train2017/000000391895.jpg".
        """
        if self._records and all(key not in record and "coco_url" in record for record in self._records):
            names = ["/".join(address.split("/")[-2:]) for address in self.texts("coco_url")]
        else:
            names = self.texts(key)
        for index, name in enumerate(names):
            # The cheap tests spare 118,000 ordinary names the parsing.
            if ".." in name or "\\" in name or name[0] == "/" or ":" in name:
                posix, windows = PurePosixPath(name), PureWindowsPath(name)
                if ".." in posix.parts + windows.parts or posix.is_absolute() or windows.drive or windows.root:
                    remedy = "Write it relative to the image folder, without '..' or a drive."
                    self.fail(index, f'"{key}" {name!r} leaves the image folder', remedy)
        try:
            return [name.encode() for name in names]
        except UnicodeEncodeError as error:
            self.fail(names.index(error.object), f'"{key}" is not valid Unicode', "Rename the file.")

    def references(self, key: str, ids: np.ndarray, section: str) -> np.ndarray:
        """Index into `ids` (int64 [n], unique, any order) of what each record refers to; int64 [len(self)]."""
        values = self.integers(key)
        order = np.argsort(ids)
        places = order[np.minimum(np.searchsorted(ids, values, sorter=order), len(ids) - 1)]
        remedy = f"Add it to the {section} or delete the annotation."
        self.fail_where(ids[places] != values, key, f"none of the {section}", remedy)
        return places

    def boxes(self, key: str) -> np.ndarray:
        """Boxes of four finite numbers (x, y, width, height) in pixels, float64 [n, 4]; sizes may be
        negative."""
        remedy = "Write it as [x, y, width, height] in pixels."
        values = self.column(key, {list}, "a list of 4 numbers", remedy)
        if not set(map(len, values)) <= {4}:
            index = next(i for i, value in enumerate(values) if len(value) != 4)
            shown = reprlib.repr(values[index])
            self.fail(index, f'"{key}" is {shown}, {len(values[index])} values where 4 are expected', remedy)
        flat = list(chain.from_iterable(values))
        if not set(map(type, flat)) <= {int, float}:
            place = next(i for i, value in enumerate(flat) if type(value) not in (int, float))
            shown = reprlib.repr(flat[place])
            self.fail(place // 4, f'"{key}" holds {shown}, {_kind(flat[place])}, expected 4 numbers', remedy)
        boxes = self._floats(key, flat, remedy, per_record=4).reshape(-1, 4)
        bad = ~(np.abs(boxes) <= MAX_COORDINATE).all(axis=1)  # written so that NaN is bad
        self.fail_where(bad, key, "not finite or beyond any image", remedy)
        return boxes

    def areas(self, key: str) -> np.ndarray:
        """Areas in square pixels, float64 [n], 0 where the file gives none."""
        remedy = "Write the area in square pixels (width x height of the box will do), or leave it out."
        values = self.column(key, {int, float, type(None)}, "a number", remedy, default=None)
        areas = self._floats(key, [0.0 if value is None else value for value in values], remedy)
        self.fail_where(~(np.abs(areas) <= MAX_AREA), key, "not finite or beyond any image", remedy)
        return areas

    def absent(self, key: str) -> np.ndarray:
        """bool [n]: whether the record leaves `key` out, or has null there."""
        return np.array([record.get(key) is None for record in self._records], dtype=bool)

    def contains(self, key: str, kind: type) -> np.ndarray:
        """bool [n]: whether the record holds a value of this type under `key`."""
        return np.array([type(record.get(key)) is kind for record in self._records], dtype=bool)

    def values(self, key: str) -> list[Any]:
        """What the records hold under `key`, unchecked; None where they leave it out."""
        return [record.get(key) for record in self._records]

    def _floats(self, key: str, values: list[Any], remedy: str, per_record: int = 1) -> np.ndarray:
        try:
            return np.array(values, dtype=np.float64)
        except OverflowError:  # an integer of more than 308 digits
            place = next(i for i, value in enumerate(values) if type(value) is int and abs(value) > 2**1000)
            self.fail(place // per_record, f'"{key}" holds a number of {len(str(values[place]))} digits', remedy)


def parse_coco(path: Path, masks: bool = False) -> dict[str, Any]:
    """The file's top-level object. Polygons are most of the file: as they are parsed they are let go, or made `light`
    with masks=True.

    Raises AnnotationError for a file that is missing, unreadable, not JSON, or not an object.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(
            f"{path}: not UTF-8 text (byte {error.start}). Give the annotation file, JSON in UTF-8."
        ) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    try:
        with _without_garbage_collection():
            content = json.loads(text, object_hook=_with_light_polygons if masks else _without_polygons)
    except RecursionError:
        raise AnnotationError(f"{path}: nested too deeply to be a COCO file. Export it again.") from None
    except json.JSONDecodeError as error:
        raise AnnotationError(
            f"{path}: not JSON: {error.msg.removesuffix(' starting at')} at line {error.lineno}, column {error.colno}. "
            "A file that ends early was not downloaded or written in full: fetch or export it again."
        ) from None
    except ValueError as error:  # an integer longer than Python is willing to convert
        raise AnnotationError(f"{path}: holds a number that cannot be read: {error}. Export it again.") from None
    if type(content) is not dict:
        raise AnnotationError(
            f'{path}: holds {_kind(content)}, expected an object of "images", "annotations", "categories". '
            "A list is COCO's results format: give the annotation file."
        )
    return content


def unreadable(path: Path, error: Exception) -> AnnotationError:
    """What to raise where the system does not let the file be read."""
    if isinstance(error, FileNotFoundError):
        return AnnotationError(f"{path}: no such file. Check the path of the annotation file.")
    reason = getattr(error, "strerror", None) or error
    return AnnotationError(f"{path}: cannot be read: {reason}. Check the path and its permissions.")


def _without_polygons(record: dict[str, Any]) -> dict[str, Any]:
    if type(record.get("segmentation")) is list:
        record["segmentation"] = None
    return record


def _with_light_polygons(record: dict[str, Any]) -> dict[str, Any]:
    if "segmentation" in record:
        record["segmentation"] = light(record["segmentation"])
    return record


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    # The parser makes millions of objects without a cycle; the collector would walk them over and over.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {
        dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "an integer",
        float: "a number with a fraction or exponent", type(None): "null",
    }  # fmt: skip
    return kinds.get(type(value), type(value).__name__)


def _names(types: set[type]) -> str:
    name: Callable[[type], str] = lambda kind: "null" if kind is type(None) else kind.__name__  # noqa: E731
    return ", ".join(sorted(name(kind) for kind in types))
