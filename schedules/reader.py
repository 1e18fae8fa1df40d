"""A schedule's name or file -> Schedule. The file is data: parsed, never executed."""

from __future__ import annotations

import os
from pathlib import Path

from schedules.errors import ScheduleError
from schedules.literals import MAX_BYTES, Origin, read_assignments
from schedules.schedule import Schedule
from schedules.vocabulary import IGNORED_KEYS, is_ignored, schedule_from_values

NAMES = ("1x", "2x", "20e")


def load_schedule(name_or_path: str | os.PathLike[str]) -> Schedule:
    """The schedule "1x", "2x" or "20e", or the one in a file in MMDetection 3.x's vocabulary.

    Keys of whole MMDetection configurations that say nothing about the schedule are left unread;
    schedule.notes names them. Raises ScheduleError, with file, line and key, for whatever is not known, and
    for a file that cannot be read.
    """
    given = os.fspath(name_or_path)
    if given in NAMES:
        path = Path(__file__).with_name(f"schedule_{given}.py")
        return read_schedule(path, name=given)
    path = Path(given)
    return read_schedule(path, name=path.stem)


def read_schedule(path: Path, name: str) -> Schedule:
    """The schedule in the file `path`; see load_schedule."""
    origin = Origin(str(path))
    try:
        text = _text(path, origin)
        values = read_assignments(text, origin, skip=is_ignored)
    except RecursionError:
        raise origin.error("nested too deeply to be a schedule") from None
    notes = tuple(
        f"{path}, line {line}: {key[0]} is ignored: {IGNORED_KEYS[key[0]]}"
        for key, line in origin.lines.items()
        if len(key) == 1 and is_ignored(key[0])
    )
    return schedule_from_values(values, name, str(path), origin, notes)


def _text(path: Path, origin: Origin) -> str:
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise origin.error(f"{what}; give {', '.join(NAMES)}, or a schedule file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path itself
        if isinstance(error, ScheduleError):
            raise
        raise origin.error(f"cannot be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise origin.error(f"is larger than {MAX_BYTES} bytes, so it is no schedule")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise origin.error("is not UTF-8 text; save it as UTF-8", line=line) from None
