"""metrics.jsonl: one JSON object a line, every training iteration and validation once.

Floats are written as repr, so what is read back is bit-equal to what was written. JSON has no NaN and no
infinity: such a value is written as null, and the record's "nonfinite" object says what stood there, e.g.

    {"kind": "train", "iteration": 7, "loss": null, "nonfinite": {"loss": "nan"}}

(inside "per_class" the key is "per_class/<name>"). Every JSON reader takes such a line; read_metrics puts
the floats back.
"""

import contextlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from detection.errors import DetectionError
from detection.reporting.disk import sync_folder
from detection.reporting.tables import UNDEFINED

OF_CLASS = "AP/"
"""Before a class's name: that class's AP."""
LOSS = "loss"
NONFINITE_KEY = "nonfinite"
LINES_LOOKED_AT = 1000
"""At the end of a file that a resume continues: a killed run may have left there what is no record."""
_BLOCK = 1 << 16
_VALIDATION = b'{"kind": "val"'
# What a record is about, and what is drawn under tags of its own.
_NO_POINTS = {"kind", "iteration", "epoch", "per_class", "notes", "num_images"}


class MetricsError(DetectionError):
    """A metrics file that cannot be read; the message names the file and the line."""


class MetricsLog:
    """Appends records to a metrics.jsonl file; every record is in the file when write() returns.

    A torn last line, left by a process killed while it wrote, is dropped when the file is opened.
    One process writes at a time. Of a long file only the end is read, and the validations, whose places are kept in
    a file beside it, metrics.jsonl.index. Without that one, or where it does not fit, it is made again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with self.path.open("r+b") as file:
                start, last = next(_lines_from_the_end(file), (0, b"\n"))
                if not last.endswith(b"\n"):
                    file.truncate(start)
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record (numbers, strings, None, dicts and lists of these; 0-d arrays become numbers).

        Raises OSError when the line cannot be written whole (a full disk); the file then ends where it
        ended before.
        """
        line = (json.dumps(_encoded(record), allow_nan=False) + "\n").encode()
        length_before = self._file.seek(0, os.SEEK_END)
        try:
            num_written = self._file.write(line)
            if num_written != len(line):
                raise OSError(f"{self.path}: only {num_written} of {len(line)} bytes of a record could be written")
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(length_before)
            raise

    def flush(self) -> None:
        """Puts the records on the disk (fsync), so that they outlive a power loss. A kill needs no flush."""
        os.fsync(self._file.fileno())

    def cut(self, train_from: int, val_from: int) -> None:
        """Drops what a resumed run is about to write again; atomic: the file is the old or the new one.

        Validation records with iteration >= val_from go, records of any other kind with iteration >= train_from go. Of
        the last lines (LINES_LOOKED_AT at least), a second record of the same kind and iteration goes too, and one that
        is no record. The lines kept stay byte for byte.
        """
        self.close()
        tail: list[bytes] = []
        start = first_iteration = 0
        with self.path.open("rb") as file:
            for place, line in _lines_from_the_end(file):
                start = place
                tail.append(line)
                kind, iteration = _kind_and_iteration(line)
                if kind == "train" and iteration is not None and iteration < min(train_from, val_from):
                    first_iteration = iteration
                    if len(tail) >= LINES_LOOKED_AT:
                        break
        tail.reverse()
        kept: dict[tuple[str, int], bytes] = {}
        for line in tail:
            kind, iteration = _kind_and_iteration(line)
            # What was not looked at is of earlier iterations than the first line here.
            if iteration is None or (start > 0 and iteration < first_iteration):
                continue
            if iteration < (val_from if kind == "val" else train_from):
                kept.setdefault((kind, iteration), line)
        self._replace_tail(start, tail, list(kept.values()))
        self._file = self.path.open("ab", buffering=0)

    def validations(self) -> list[dict[str, Any]]:
        """All records of validations, in the file's order."""
        with self.path.open("rb") as file:
            return [_decoded(_record_at(file, place)) for place in self._places_of_validations(file)]

    def since(self, trained: int, validated: int) -> Iterator[dict[str, Any]]:
        """The records of trainings after iteration `trained`, and of validations after iteration `validated`, in the
        file's order."""
        with self.path.open("rb") as file:
            first = 0
            for start, line in _lines_from_the_end(file) if trained >= 0 else ():
                kind, iteration = _kind_and_iteration(line)
                if kind == "train" and iteration is not None and iteration <= trained:
                    first = start
                    break
            for place in self._places_of_validations(file):
                if place < first and (record := _record_at(file, place))["iteration"] > validated:
                    yield _decoded(record)
            file.seek(first)
            after = {"train": trained, "val": validated}
            for line in file:
                kind, iteration = _kind_and_iteration(line)
                if iteration is not None and kind in after and iteration > after[kind]:
                    yield _decoded(json.loads(line))

    def close(self) -> None:
        self._file.close()

    @property
    def _index(self) -> Path:
        return self.path.with_name(f"{self.path.name}.index")

    def _replace_tail(self, start: int, tail: list[bytes], kept: list[bytes]) -> None:
        if kept == tail:
            return
        if kept == tail[: len(kept)]:
            with self.path.open("r+b") as whole:
                whole.truncate(start + sum(map(len, kept)))
                os.fsync(whole.fileno())
            return
        temporary = self.path.with_name(f".{self.path.name}.new")
        try:
            self._index.unlink(missing_ok=True)  # its places move
            with self.path.open("rb") as source, temporary.open("wb") as copy:
                shutil.copyfileobj(source, copy)
                copy.truncate(start)
                copy.seek(start)
                copy.write(b"".join(kept))
                copy.flush()
                os.fsync(copy.fileno())
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # a full disk needs the room
            raise
        sync_folder(self.path.parent)

    def _places_of_validations(self, file: BinaryIO) -> list[int]:
        """Where each record of a validation begins. What was not looked at before is searched, and remembered."""
        length = file.seek(0, os.SEEK_END)
        try:
            looked_at, *places = np.fromfile(self._index, dtype="<i8").tolist()
        except (OSError, ValueError):
            looked_at, places = 0, []
        places = [place for place in places if place < length]
        if looked_at < 0 or not all(_is_validation(file, place) for place in places):
            looked_at, places = 0, []
        if looked_at < length:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                place = looked_at - 1
                while (place := content.find(_VALIDATION, place + 1)) >= 0:
                    if _is_validation(file, place):
                        places.append(place)
        if looked_at != length:
            with contextlib.suppress(OSError):  # it only spares the next start the search
                np.array([length, *places], dtype="<i8").tofile(self._index)
        return places


def read_metrics(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the file's order; only of one kind ("train", "val") where given.

    A torn last line is left out. Raises MetricsError where another line is no record, FileNotFoundError
    without a file.
    """
    records = []
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if record is None:
            raise MetricsError(
                f"{path}, line {number}: not a metrics record (a JSON object was expected). Remove the line."
            )
        if kind is None or record.get("kind") == kind:
            records.append(_decoded(record))
    return records


def points_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a record by tag: train/<name>, or val/<name>, and val/AP/<class> and val/segm_AP/<class> of the
    classes; of several sets also val/<set>/<name>.

    A figure of a validation that is -1 (nothing of that kind in the ground truth) is left out.
    """
    kind = record["kind"]
    points = {
        f"{kind}/{name}": float(value)
        for name, value in record.items()
        if name not in _NO_POINTS and not (value is None or isinstance(value, (str, bool, Mapping, list, tuple)))
    }
    for tag, of_classes in (("AP", "per_class"), ("segm_AP", "segm_per_class"), ("voc_AP", "voc_per_class")):
        points |= {f"{kind}/{tag}/{name}": float(value) for name, value in record.get(of_classes, {}).items()}
    for set_name, figures in record.get("sets", {}).items():
        of_set = points_of({"kind": kind, **figures})
        points |= {f"{kind}/{set_name}/{tag.partition('/')[2]}": value for tag, value in of_set.items()}
    return points if kind == "train" else {tag: value for tag, value in points.items() if value != UNDEFINED}


def metric_of(metrics: Mapping[str, Any], name: str) -> float | None:
    """The figure `name` of a validation's metrics, the loss negated: the higher the better. None where it is not
    defined."""
    if name == LOSS:
        loss = metrics.get(LOSS, math.nan)
        return None if math.isnan(loss) else -loss
    set_name, _, of_set = name.partition("/")
    if set_name in metrics.get("sets", {}):
        return metric_of(metrics["sets"][set_name], of_set)
    of_classes = metrics.get("per_class", {})
    value = of_classes.get(name[len(OF_CLASS) :]) if name.startswith(OF_CLASS) else metrics.get(name)
    return None if value is None or value < 0 or math.isnan(value) else float(value)


def _lines_from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line, the last one first."""
    start, rest = file.seek(0, os.SEEK_END), b""
    while start:
        size = min(_BLOCK, start)
        start -= size
        file.seek(start)
        rest = file.read(size) + rest
        place = len(rest)
        while (before := rest.rfind(b"\n", 0, place - 1)) >= 0:
            yield start + before + 1, rest[before + 1 : place]
            place = before + 1
        rest = rest[:place]
    if rest:
        yield 0, rest


def _is_validation(file: BinaryIO, place: int) -> bool:
    file.seek(max(place - 1, 0))
    if place and file.read(1) != b"\n":
        return False
    kind, iteration = _kind_and_iteration(file.readline())
    return kind == "val" and iteration is not None


def _record_at(file: BinaryIO, place: int) -> dict[str, Any]:
    file.seek(place)
    record: dict[str, Any] = json.loads(file.readline())
    return record


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _kind_and_iteration(line: bytes) -> tuple[str, int | None]:
    record = _parsed(line) or {}
    kind, iteration = record.get("kind"), record.get("iteration")
    return str(kind), iteration if isinstance(kind, str) and isinstance(iteration, int) else None


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch (0-d) as Python's own."""
    return value.item() if hasattr(value, "item") and not isinstance(value, (int, float)) else value


def _encoded(record: Mapping[str, Any]) -> dict[str, Any]:
    nonfinite: dict[str, str] = {}

    def finite(value: Any, key: str) -> Any:
        value = _plain(value)
        if isinstance(value, Mapping):
            return {str(name): finite(inner, f"{key}/{name}" if key else str(name)) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [_plain(inner) for inner in value]
        if isinstance(value, float):
            value = float(value)
            if not math.isfinite(value):
                nonfinite[key] = repr(value)
                return None
        return value

    encoded = finite(record, "")
    if nonfinite:
        encoded[NONFINITE_KEY] = nonfinite
    return encoded


def _decoded(record: dict[str, Any]) -> dict[str, Any]:
    for key, text in record.pop(NONFINITE_KEY, {}).items():
        holder, name = record, key
        # The name of a class may have a slash of its own.
        while name not in holder:
            outer, _, name = name.partition("/")
            holder = holder[outer]
        holder[name] = float(text)
    return record
