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
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.errors import DetectionError
from detection.reporting.disk import sync_folder

NONFINITE_KEY = "nonfinite"


class MetricsError(DetectionError):
    """A metrics file that cannot be read; the message names the file and the line."""


@dataclass(frozen=True)
class CutReport:
    """What MetricsLog.cut did: records kept, records dropped past the cut (or doubled), lines that were no
    record."""

    kept: int
    dropped: int
    unreadable: int


class MetricsLog:
    """Appends records to a metrics.jsonl file; every record is in the file when write() returns.

    A torn last line, left by a process killed while it wrote, is dropped when the file is opened.
    One process writes at a time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        self._descriptor: int | None = self._open()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record (numbers, strings, None, dicts and lists of these; 0-d arrays become numbers).

        Raises OSError when the line cannot be written whole (a full disk); the file then ends where it
        ended before.
        """
        if self._descriptor is None:
            raise ValueError(f"{self.path}: the metrics log is closed")
        line = (json.dumps(_encoded(record), allow_nan=False) + "\n").encode()
        length_before = os.fstat(self._descriptor).st_size
        try:
            num_written = os.write(self._descriptor, line)
            if num_written != len(line):
                raise OSError(f"{self.path}: only {num_written} of {len(line)} bytes of a record could be written")
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, length_before)
            raise

    def flush(self) -> None:
        """Puts the records on the disk (fsync), so that they outlive a power loss. A kill needs no flush."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def cut(self, train_from: int, val_from: int) -> CutReport:
        """Drops what a resumed run is about to write again; atomic: the file is the old or the new one.

        Validation records with iteration >= val_from go, records of any other kind with iteration >=
        train_from go. A second record of the same kind and iteration goes too. The lines kept stay byte for
        byte.
        """
        self.close()
        kept: list[bytes] = []
        num_dropped = num_unreadable = 0
        seen: set[tuple[str, int]] = set()
        for line in self.path.read_bytes().splitlines(keepends=True):
            place = _kind_and_iteration(line)
            if place is None:
                num_unreadable += 1
            elif place in seen or place[1] >= (val_from if place[0] == "val" else train_from):
                num_dropped += 1
            else:
                seen.add(place)
                kept.append(line)
        if num_dropped or num_unreadable:
            _replace(self.path, b"".join(kept))
        self._descriptor = self._open()
        return CutReport(len(kept), num_dropped, num_unreadable)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def read_metrics(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the file's order; only of one kind ("train", "val") where given.

    A torn last line is left out. Raises MetricsError where another line is no record, FileNotFoundError
    without a file.
    """
    records = []
    for number, line in _whole_lines(Path(path)):
        record = _parsed(line)
        if record is None:
            raise MetricsError(
                f"{path}, line {number}: not a metrics record (a JSON object was expected). "
                "Remove the line, or resume the run: a resume drops such lines."
            )
        if kind is None or record.get("kind") == kind:
            records.append(_decoded(record))
    return records


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _kind_and_iteration(line: bytes) -> tuple[str, int] | None:
    record = _parsed(line)
    if record is None:
        return None
    kind, iteration = record.get("kind"), record.get("iteration")
    if not isinstance(kind, str) or not isinstance(iteration, int):
        return None
    return kind, iteration


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


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        keep, block = end, 4096
        while keep:
            start = max(0, keep - block)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep != end:
            file.truncate(keep)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".cutting")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
