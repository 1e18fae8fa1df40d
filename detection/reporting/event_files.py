"""TensorBoard's event files on disk: written, read to their torn end, and cut back where a run resumes.

An event file is a row of records: length (uint64), masked CRC-32C of the length, the data (an Event
message), masked CRC-32C of the data. A killed writer leaves a torn last record, after which a reader of the
file sees nothing more.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from detection.reporting.disk import sync_folder

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_MARK = "tfevents."  # TensorBoard takes every file with this in its name; temporary files must not have it
_TEMPORARY = "events-being-cut.tmp"
SETTINGS_TAGS = frozenset({"_hparams_/experiment", "_hparams_/session_start_info"})
"""Where TensorBoard's HPARAMS page finds a run's settings. It takes the first record of a tag and no later one: a
resume takes out the old one."""


class EventWriter:
    """Writes one event file, each record before the call returns.

    TensorBoard's own writer has a thread, which on a full disk dies with a traceback and loses what it had taken. Here
    the caller gets the OSError; a torn record may be left at the file's end.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        """Begins a file, with the mark of a start at `first_step`, which tells an open TensorBoard to forget what is
        past it. It is the last of `directory` where `cut_event_files` was called before."""
        self.path = directory / f"events.out.{_MARK}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = self.path.open("ab", buffering=0)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, summary: Summary, step: int) -> None:
        self._write(Event(step=step, summary=summary))

    def sync(self) -> None:
        """Puts the file on the disk (fsync)."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        rest = b"".join([length, _crc(length), data, _crc(data)])
        while rest:  # a disk that is nearly full takes a part
            rest = rest[self._file.write(rest) :]


def _crc(data: bytes) -> bytes:
    return _FOOTER.pack(masked_crc32c(data))


@dataclass
class EventHistory:
    """What the event files of a run hold after the cut: last step of each tag, last text of each text tag."""

    last_steps: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def event_files(directory: Path) -> list[Path]:
    """The event files of a directory in TensorBoard's order: that of their names and so of their start times."""
    return sorted(path for path in directory.iterdir() if _MARK in path.name)


def read_records(path: Path) -> Iterator[bytes]:
    """The whole records of an event file, framing included; ends at the first torn or damaged one.

    The checksum of the data is looked at for the last record only, where a kill or a power loss leaves its
    damage: computing it in Python for every image would make a resume wait for minutes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, length_crc = _HEADER.unpack(header)
            end = file.tell() + length + _FOOTER.size
            if masked_crc32c(header[:8]) != length_crc or end > size:
                return
            body = file.read(length + _FOOTER.size)
            if end == size and masked_crc32c(body[:length]) != _FOOTER.unpack(body[length:])[0]:
                return
            yield header + body


def parse_record(record: bytes) -> Event:
    """The Event message of a record; DecodeError where the data is none."""
    return Event.FromString(record[_HEADER.size : -_FOOTER.size])


def cut_event_files(directory: Path, *, first_iteration: int, val_from: int) -> EventHistory:
    """Removes from disk every point that the resumed run will write again, and returns what is left.

    Messages whose tags start with "val/" go from step val_from on, all others from step first_iteration on; so
    does one whose step its tags have already passed, and a torn last record. The run's settings (SETTINGS_TAGS) go too,
    for the resumed run writes its own. Each file keeps its name, for
    a TensorBoard that is open meanwhile goes on from the file that it has come to; it is written anew beside the
    old one and renamed, so that a kill leaves the one or the other.
    """
    temporary = directory / _TEMPORARY
    temporary.unlink(missing_ok=True)
    history = EventHistory()
    for number, path in enumerate(event_files(directory)):
        with temporary.open("wb") as output:
            for record in _kept(path, history, first_iteration, val_from, keep_start=number == 0):
                output.write(record)
            output.flush()
            os.fsync(output.fileno())
        if temporary.stat().st_size == path.stat().st_size:  # nothing was left out
            temporary.unlink()
        else:
            temporary.replace(path)
    _put_before_now(event_files(directory))
    sync_folder(directory)
    return history


def _kept(
    path: Path, history: EventHistory, first_iteration: int, val_from: int, *, keep_start: bool
) -> Iterator[bytes]:
    """The records of a file that stay. Its version stays; of the session marks only the one that began the run.

    The marks of later starts tell a reader to forget what is past their step. In files that have been cut they
    have nothing left to say.
    """
    for record in read_records(path):
        try:
            event = parse_record(record)
        except DecodeError:
            return
        kind = event.WhichOneof("what")
        if kind == "file_version" or (kind == "session_log" and keep_start):
            yield record
        if kind != "summary":
            continue
        # A message has values of one step, all of them of training or all of a validation: see TensorBoardLog.
        values = event.summary.value
        if any(value.tag in SETTINGS_TAGS for value in values):
            continue
        limit = val_from if any(value.tag.startswith("val/") for value in values) else first_iteration
        if all(history.last_steps.get(value.tag, -1) < event.step < limit for value in values):
            for value in values:
                history.last_steps[value.tag] = event.step
                if value.metadata.plugin_data.plugin_name == "text" and value.tensor.string_val:
                    history.texts[value.tag] = value.tensor.string_val[0].decode()
            yield record


def _put_before_now(files: list[Path]) -> None:
    """Moves the times in the files' names back where they would not sort before a file begun now.

    TensorBoard reads a run's files in the order of the whole seconds in their names, and takes a step that goes
    backwards for a restart. A resume within the same second, or on a machine whose clock is behind, must not
    look so. The order among the files stays, also between two renamings.
    """
    now = int(time.time())
    for number, path in enumerate(files):
        head, _, tail = path.name.partition(_MARK)
        seconds, dot, rest = tail.partition(".")
        latest = now - len(files) + number
        if seconds.isdigit() and int(seconds) > latest:
            path.rename(path.with_name(f"{head}{_MARK}{latest:010d}{dot}{rest}"))
