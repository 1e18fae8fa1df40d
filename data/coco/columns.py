"""A COCO JSON file as checked columns: the only code that touches the Python objects of the parser.

The records of a list come some thousand at a time. Each check runs over a column of them at once (a set of types, a
numpy comparison), and only a column that fails is searched for the record to name. So the checks of 25 million
annotations cost a fraction of what parsing them costs, and memory holds the columns alone.
"""

import reprlib
from collections.abc import Callable
from itertools import chain
from operator import attrgetter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np

from data.coco.federated import NEGATIVE, NOT_EXHAUSTIVE
from data.coco.json_stream import KINDS, JsonError, JsonStream, kind_of, record_decoder, without_garbage_collection
from data.coco.segmentations import light
from data.errors import DataError

MAX_IMAGE_PIXELS = 178_956_970  # what Pillow is willing to decode (Image.MAX_IMAGE_PIXELS twice)
MAX_IMAGE_SIDE = 1_000_000  # pixels; far beyond what an image file can hold, far below what overflows
MAX_COORDINATE = 1e9  # pixels; float32 and float64 sums of such values stay finite
MAX_AREA = 1e18  # square pixels
_LARGE_BYTES = 1 << 25  # above it, the C library asks the system for memory and gives it back
_ROWS_AT_ONCE = 1 << 20


class _Absent:
    """The type of ABSENT alone."""


ABSENT = _Absent()
"""What a record has under a key that it leaves out."""


class AnnotationError(DataError):
    """An annotation file that cannot be used. One message: file, record, what is wrong, and the remedy."""


class RecordFault(Exception):
    """What is wrong with a record, before it is known in how many more."""

    def __init__(
        self,
        section: str,
        index: int,
        identity: Any,
        problem: str,
        remedy: str,
        num_alike: int | None = None,
        mixed: str | None = None,
    ) -> None:
        super().__init__(problem)
        self._place = f"{section}[{index}]" + ("" if identity is ABSENT else f" (id {reprlib.repr(identity)})")
        self._problem, self._remedy = problem, remedy
        self._num_alike, self._mixed = num_alike, mixed

    def count(self, later: "RecordFault") -> None:
        """Takes a later fault of the column, which counts if it is of the same kind."""
        if self._num_alike is not None and later._num_alike is not None and self._mixed == later._mixed:
            self._num_alike += later._num_alike

    def error(self, path: Path, found: dict[str, set[type]]) -> AnnotationError:
        """What the user is told. found: the types of all values in the list, by key."""
        types = found[self._mixed] - {_Absent} if self._mixed is not None else set()
        more = f" (the file mixes {_names(types)})" if len(types) > 1 else ""
        others = (self._num_alike or 1) - 1
        more += f" ({others:,} more like it)" if others else ""
        return AnnotationError(f"{path}: {self._place}: {self._problem}{more}. {self._remedy}")


class Records:
    """Records of one list of the file ("images", "annotations" or "categories"), whose columns are taken out checked.

    first: the place of the first of them in the list. found: gets the types of the values by key. records: dicts, or
    objects that have the keys as attributes. What the methods raise is RecordFault.
    """

    def __init__(self, section: str, records: list[Any], first: int, found: dict[str, set[type]]) -> None:
        self.section = section
        self._records, self._first, self._found = records, first, found
        self._are_dicts = bool(records) and type(records[0]) is dict

    def all_of(self, key: str) -> list[Any]:
        """What the records hold under `key`, unchecked; ABSENT where they leave it out."""
        if self._are_dicts:
            return [record.get(key, ABSENT) for record in self._records]
        return list(map(attrgetter(key), self._records))

    def fail(
        self, index: int, problem: str, remedy: str, num_alike: int | None = None, mixed: str | None = None
    ) -> NoReturn:
        """Raises the fault of record `index` of these. num_alike: how many of them have it, where that was counted.
        mixed: the key whose types of value tell more."""
        identity = self.all_of("id")[index]
        raise RecordFault(self.section, self._first + index, identity, problem, remedy, num_alike, mixed)

    def fail_where(self, bad: np.ndarray, key: str, problem: str, remedy: str) -> None:
        """Fails at the first true entry of `bad` (bool [n]); does nothing without one."""
        if bad.any():
            index = int(np.argmax(bad))
            shown = reprlib.repr(self.all_of(key)[index])
            self.fail(index, f'"{key}" is {shown}, {problem}', remedy, int(bad.sum()))

    def column(self, key: str, types: set[type], expected: str, remedy: str, default: Any = ABSENT) -> list[Any]:
        """The values under `key`, each of one of exactly these types (so bool is not int)."""
        values = self.all_of(key)
        found = set(map(type, values))
        if _Absent in found:
            if default is ABSENT:
                self.fail(values.index(ABSENT), f'has no "{key}"', remedy)
            values = [default if value is ABSENT else value for value in values]
            found = set(map(type, values))
        self._found.setdefault(key, set()).update(found)
        if not found <= types:
            index = next(i for i, value in enumerate(values) if type(value) not in types)
            shown = f"{reprlib.repr(values[index])}, {kind_of(values[index])}"
            num_alike = sum(type(value) not in types for value in values)
            self.fail(index, f'"{key}" is {shown}, expected {expected}', remedy, num_alike, mixed=key)
        return values

    def integers(self, key: str) -> np.ndarray:
        """Whole numbers, int64 [n]. Neither text nor 1.0 nor true is taken for one."""
        remedy = f'Write every "{key}" as a JSON integer, the same way in all records that refer to it.'
        values = self.column(key, {int}, "an integer", remedy)
        try:
            return np.fromiter(values, np.int64, len(values))
        except OverflowError:
            index = next(i for i, value in enumerate(values) if not -(2**63) <= value < 2**63)
            self.fail(index, f'"{key}" is {reprlib.repr(values[index])}, beyond 64 bits', remedy)

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
        return np.fromiter((value != 0 for value in values), bool, len(values)) if any(values) else _none(values)

    def texts(self, key: str) -> list[str]:
        """Non-empty texts that can be encoded and printed."""
        remedy = f'Write a non-empty text under "{key}".'
        values = self.column(key, {str}, "a text", remedy)
        for index, value in enumerate(values):
            if not value.strip() or "\0" in value:
                self.fail(index, f'"{key}" is {reprlib.repr(value)}, empty or with a NUL character', remedy)
        return values

    def decodable(self) -> np.ndarray:
        """bool [n], all true: the images are no larger than what can be decoded."""
        # Memory is set aside by these sizes before an image is opened.
        large = self.sides("width") * self.sides("height") > MAX_IMAGE_PIXELS
        remedy = 'Correct "width" and "height", or store a smaller copy of the image.'
        problem = f"and with the height more than the {MAX_IMAGE_PIXELS:,} pixels that an image may have"
        self.fail_where(large, "width", problem, remedy)
        return ~large

    def file_names(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Names of files inside a folder, neither absolute nor with a way up: their UTF-8, uint8 [bytes], and the
        length of each, int64 [n].

        LVIS has no names. There it is the last two parts of an image's address, as "train2017/000000391895.jpg".
        """
        if (
            self._records
            and all(value is ABSENT for value in self.all_of(key))
            and ABSENT not in self.all_of("coco_url")
        ):
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
            encoded = [name.encode() for name in names]
        except UnicodeEncodeError as error:
            self.fail(names.index(error.object), f'"{key}" is not valid Unicode', "Rename the file.")
        return np.frombuffer(b"".join(encoded), np.uint8), np.fromiter(map(len, encoded), np.int64, len(encoded))

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
            self.fail(place // 4, f'"{key}" holds {shown}, {kind_of(flat[place])}, expected 4 numbers', remedy)
        boxes = self._floats(key, flat, remedy, per_record=4).reshape(-1, 4)
        bad = ~(np.abs(boxes) <= MAX_COORDINATE).all(axis=1)  # written so that NaN is bad
        self.fail_where(bad, key, "not finite or beyond any image", remedy)
        return boxes

    def areas(self, key: str) -> np.ndarray:
        """Areas in square pixels, float64 [n], 0 where the file gives none."""
        remedy = "Write the area in square pixels (width x height of the box will do), or leave it out."
        values = self.column(key, {int, float, type(None)}, "a number", remedy, default=None)
        if None in values:
            values = [0.0 if value is None else value for value in values]
        areas = self._floats(key, values, remedy)
        self.fail_where(~(np.abs(areas) <= MAX_AREA), key, "not finite or beyond any image", remedy)
        return areas

    def absent(self, key: str) -> np.ndarray:
        """bool [n]: whether the record leaves `key` out, or has null there."""
        values = self.all_of(key)
        if not set(map(type, values)) & {_Absent, type(None)}:
            return _none(values)
        return np.fromiter((value is None or value is ABSENT for value in values), bool, len(values))

    def crowds_without_rle(self) -> np.ndarray:
        """bool [n]: whether the record is of a crowd and has no run lengths."""
        crowd = self.flags("iscrowd")
        if crowd.any():
            outlines = self.all_of("segmentation")
            for index in np.flatnonzero(crowd).tolist():
                crowd[index] = not (type(outlines[index]) is dict or _is_raw_object(outlines[index]))
        return crowd

    def id_lists(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Lists of category ids: all of them, int64, and the length of each, int64 [n]."""
        remedy = f'LVIS gives every image a list of category ids under "{key}", which may be empty.'
        self._found.setdefault(key, set()).update(map(type, self.all_of(key)))
        lists = self.column(key, {list}, "a list of category ids", remedy)
        for index, values in enumerate(lists):
            if not all(type(value) is int and abs(value) < 2**63 for value in values):
                self.fail(index, f'"{key}" holds what is no category id', remedy)
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        return np.fromiter(chain.from_iterable(lists), np.int64, int(lengths.sum())), lengths

    def outlines(self) -> list[Any]:
        """The "segmentation" of each, as `light` leaves it; None where there is none."""
        return [None if value is ABSENT else light(value) for value in self.all_of("segmentation")]

    def _floats(self, key: str, values: list[Any], remedy: str, per_record: int = 1) -> np.ndarray:
        try:
            return np.fromiter(values, np.float64, len(values))
        except OverflowError:  # an integer of more than 308 digits
            place = next(i for i, value in enumerate(values) if type(value) is int and abs(value) > 2**1000)
            self.fail(place // per_record, f'"{key}" holds a number of {len(str(values[place]))} digits', remedy)


class _Parts:
    """A column as it comes. Arrays of some size have memory of their own, which the system gets back; many small ones
    would leave holes that nothing else fits into."""

    def __init__(self) -> None:
        self._large: list[np.ndarray] = []
        self._small: list[Any] = []
        self._num_bytes = 0

    def add(self, part: Any) -> None:
        self._small.append(part)
        self._num_bytes += part.nbytes if isinstance(part, np.ndarray) else 0
        if self._num_bytes >= _LARGE_BYTES:
            self._large.append(np.concatenate(self._small))
            self._small, self._num_bytes = [], 0

    def joined(self) -> Any:
        """The whole column; its parts are let go one after the other."""
        parts = [*self._large, *self._small]
        self._large, self._small = [], []
        if isinstance(parts[0], list):
            return list(chain.from_iterable(parts))
        if isinstance(parts[0], tuple):
            return tuple(map(np.concatenate, zip(*parts, strict=True)))
        whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
        end = len(whole)
        while parts:
            part = parts.pop()
            whole[end - len(part) : end] = part
            end -= len(part)
        return whole


class Section:
    """One list of the file as checked columns. What is wrong is raised when a column is taken, not when it is read."""

    def __init__(self, path: Path, name: str, masks: bool = False) -> None:
        self._path, self._name = path, name
        self._readers = dict(COLUMNS[name])
        if masks and name == "annotations":
            self._readers["segmentation"] = Records.outlines
        self._parts = {key: _Parts() for key in self._readers}
        self._faults: dict[str, RecordFault] = {}
        self._error: AnnotationError | None = None
        self._found: dict[str, set[type]] = {}
        self._ids: np.ndarray | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, records: list[Any]) -> None:
        """Takes the next records of the list."""
        first = self._length
        self._length += len(records)
        if self._error is not None:
            return
        if set(map(type, records)) & KINDS.keys() - {dict}:
            index = next(i for i, record in enumerate(records) if type(record) is not dict)
            self._error = AnnotationError(
                f"{self._path}: {self._name}[{first + index}] is {kind_of(records[index])}, expected an object. "
                "Write the file in the COCO format."
            )
            return
        part = Records(self._name, records, first, self._found)
        for key, read in self._readers.items():
            try:
                self._parts[key].add(read(part))
            except RecordFault as fault:
                if key in self._faults:
                    self._faults[key].count(fault)
                self._faults.setdefault(key, fault)

    def whole(self) -> "Section":
        """Itself, where it is a list of objects."""
        if self._error is not None:
            raise self._error
        return self

    def has(self, key: str, kind: type) -> bool:
        """Whether a record has a value of this type under `key`."""
        return kind in self._found.get(key, ())

    def take(self, key: str) -> Any:
        """A column of COLUMNS, which is let go here."""
        if key in self._faults:
            raise self._faults[key].error(self._path, self._found)
        parts = self._parts.pop(key)
        if not self._length:
            parts.add(self._readers[key](Records(self._name, [], 0, {})))
        return parts.joined()

    def unique_ids(self) -> np.ndarray:
        """The ids, which occur once each, int64 [n]."""
        values = self.take("id")
        self._ids = values
        if (values[1:] > values[:-1]).all():
            return values
        order = np.argsort(values, kind="stable")
        repeated = np.flatnonzero(values[order][1:] == values[order][:-1])
        if len(repeated):
            first, second = int(order[repeated[0]]), int(order[repeated[0] + 1])
            self.fail(
                second,
                f"the id is taken by {self._name}[{first}] already"
                + (f" ({len(repeated):,} such records)" if len(repeated) > 1 else ""),
                f"Give every one of the {self._name} an id of its own.",
            )
        return values

    def references(self, key: str, ids: np.ndarray, section: str) -> np.ndarray:
        """Index into `ids` (int64 [n], unique, any order) of what each record refers to; int64 [len(self)]."""
        values = self.take(key)
        order = np.argsort(ids)
        num_bad, first, shown = 0, 0, 0
        for start in range(0, len(values), _ROWS_AT_ONCE):
            piece = values[start : start + _ROWS_AT_ONCE]
            places = order[np.minimum(np.searchsorted(ids, piece, sorter=order), len(ids) - 1)]
            bad = np.flatnonzero(ids[places] != piece)
            if len(bad) and not num_bad:
                first, shown = start + int(bad[0]), int(piece[bad[0]])
            num_bad += len(bad)
            piece[:] = places
        if num_bad:
            remedy = f"Add it to the {section} or delete the annotation."
            self.fail(first, f'"{key}" is {shown}, none of the {section}', remedy, num_bad)
        return values

    def fail(self, index: int, problem: str, remedy: str, num_alike: int | None = None) -> NoReturn:
        """Raises the AnnotationError of record `index`."""
        named = ABSENT if self._ids is None else int(self._ids[index])
        raise RecordFault(self._name, index, named, problem, remedy, num_alike).error(self._path, {})


COLUMNS: dict[str, dict[str, Callable[[Records], Any]]] = {
    "images": {
        "id": lambda records: records.integers("id"),
        "width": lambda records: records.sides("width"),
        "height": lambda records: records.sides("height"),
        "decodable": Records.decodable,
        "file_name": lambda records: records.file_names("file_name"),
        NEGATIVE: lambda records: records.id_lists(NEGATIVE),
        NOT_EXHAUSTIVE: lambda records: records.id_lists(NOT_EXHAUSTIVE),
    },
    "annotations": {
        "id": lambda records: records.integers("id"),
        "image_id": lambda records: records.integers("image_id"),
        "category_id": lambda records: records.integers("category_id"),
        "bbox": lambda records: records.boxes("bbox"),
        "area": lambda records: records.areas("area"),
        "iscrowd": lambda records: records.flags("iscrowd"),
        "ignore": lambda records: records.flags("ignore"),
        "no-area": lambda records: records.absent("area"),
        "no-iscrowd": lambda records: records.absent("iscrowd"),
        "crowd-without-rle": Records.crowds_without_rle,
    },
    "categories": {
        "id": lambda records: records.integers("id"),
        "name": lambda records: records.texts("name"),
        "frequency": lambda records: records.all_of("frequency"),
    },
}
"""What is made of each list of the file, by name."""
_FIELDS = {
    "images": ("id", "width", "height", "file_name", "coco_url", NEGATIVE, NOT_EXHAUSTIVE),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation"),
    "categories": ("id", "name", "frequency"),
}


def parse_coco(path: Path, masks: bool = False) -> dict[str, Any]:
    """The file's top-level object, its lists "images", "annotations" and "categories" as Section.

    The file is read as a stream. Fields that nothing is made of, with masks=False the polygons as well, are passed
    over where msgspec is installed.

    Raises AnnotationError for a file that is missing, unreadable, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file, without_garbage_collection():
            stream = JsonStream(file)
            if stream.peek() != "{":
                content = stream.value()
                stream.require_end()
                raise AnnotationError(
                    f'{path}: holds {kind_of(content)}, expected an object of "images", "annotations", "categories". '
                    "A list is COCO's results format: give the annotation file."
                )
            sections: dict[str, Any] = {}
            for name in stream.members():
                if name in COLUMNS and stream.peek() == "[":
                    sections[name] = section = Section(path, name, masks)
                    unread = () if masks else ("segmentation",)
                    for records in stream.records(record_decoder(_FIELDS[name], ABSENT, unread)):
                        section.add(records)
                else:
                    sections[name] = stream.value()
            stream.require_end()
            return sections
    except UnicodeDecodeError as error:
        raise AnnotationError(
            f"{path}: not UTF-8 text (byte {error.start}). Give the annotation file, JSON in UTF-8."
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except RecursionError:
        raise AnnotationError(f"{path}: nested too deeply to be a COCO file. Export it again.") from None
    except JsonError as error:
        raise AnnotationError(
            f"{path}: not JSON: {error.problem} at line {error.line}, column {error.column}. "
            "A file that ends early was not downloaded or written in full: fetch or export it again."
        ) from None
    except AnnotationError:
        raise
    except ValueError as error:  # an integer longer than Python is willing to convert, or a path with a NUL
        raise AnnotationError(f"{path}: holds a number that cannot be read: {error}. Export it again.") from None


def unreadable(path: Path, error: Exception) -> AnnotationError:
    """What to raise where the system does not let the file be read."""
    if isinstance(error, FileNotFoundError):
        return AnnotationError(f"{path}: no such file. Check the path of the annotation file.")
    reason = getattr(error, "strerror", None) or error
    return AnnotationError(f"{path}: cannot be read: {reason}. Check the path and its permissions.")


def _none(values: list[Any]) -> np.ndarray:
    return np.zeros(len(values), dtype=bool)


def _is_raw_object(value: Any) -> bool:
    """Whether it is JSON that was left as it is, of an object."""
    return type(value) not in KINDS and value is not ABSENT and bytes(memoryview(value)[:1]) == b"{"


def _names(types: set[type]) -> str:
    name: Callable[[type], str] = lambda kind: "null" if kind is type(None) else kind.__name__  # noqa: E731
    return ", ".join(sorted(name(kind) for kind in types))
