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
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detection.errors import DetectionError
from detection.reporting.disk import write_whole
from detection.reporting.tables import UNDEFINED

NONFINITE_KEY = "nonfinite"
# What a record is about, and what is drawn under tags of its own.
_NO_POINTS = {"kind", "iteration", "epoch", "per_class", "notes", "num_images"}


class MetricsError(DetectionError):
    """A metrics file that cannot be read; the message names the file and the line."""


class MetricsLog:
    """Appends records to a metrics.jsonl file; every record is in the file when write() returns.

    A torn last line, left by a process killed while it wrote, is dropped when the file is opened.
    One process writes at a time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with self.path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
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

        Validation records with iteration >= val_from go, records of any other kind with iteration >=
        train_from go. A second record of the same kind and iteration goes too, and lines that are no record. The lines
        kept stay byte for byte.
        """
        self.close()
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept: dict[tuple[str, int], bytes] = {}
        for line in lines:
            kind, iteration = _kind_and_iteration(line)
            if iteration is not None and iteration < (val_from if kind == "val" else train_from):
                kept.setdefault((kind, iteration), line)
        if len(kept) < len(lines):
            write_whole(self.path, b"".join(kept.values()))
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()


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
                f"{path}, line {number}: not a metrics record (a JSON object was expected). "
                "Remove the line, or resume the run: a resume drops such lines."
            )
        if kind is None or record.get("kind") == kind:
            records.append(_decoded(record))
    return records


def points_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a record by tag: train/<name>, or val/<name>, and val/AP/<class> and val/segm_AP/<class> of the
    classes.

    A figure of a validation that is -1 (nothing of that kind in the ground truth) is left out.
    """
    kind = record["kind"]
    points = {
        f"{kind}/{name}": float(value)
        for name, value in record.items()
        if name not in _NO_POINTS and not (value is None or isinstance(value, (str, bool, Mapping, list, tuple)))
    }
    for tag, of_classes in (("AP", "per_class"), ("segm_AP", "segm_per_class")):
        points |= {f"{kind}/{tag}/{name}": float(value) for name, value in record.get(of_classes, {}).items()}
    return points if kind == "train" else {tag: value for tag, value in points.items() if value != UNDEFINED}


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
        outer, _, inner = key.partition("/")
        if inner:
            record[outer][inner] = float(text)
        else:
            record[outer] = float(text)
    return record
