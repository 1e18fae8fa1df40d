"""The one error that a wrong schedule raises, and the place in the schedule that it names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class ScheduleError(ValueError):
    """A schedule cannot be used; the message says what is wrong, where, and how to mend it."""


class UnknownKey(ScheduleError):
    """A key that the vocabulary does not have, at `path`."""

    def __init__(self, message: str, path: tuple[str, ...]) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Place:
    """A key of a schedule, so that a message can name file, line and key.

    source: the file, or "override". path: the keys and list places that lead there. lines: file and line of each
    path, filled by schedules.reading.expressions; None for a source without lines.
    """

    source: str
    path: tuple[str, ...] = ()
    lines: dict[tuple[str, ...], tuple[str, int]] | None = None

    def at(self, key: object) -> Place:
        return Place(self.source, (*self.path, str(key)), self.lines)

    def mark(self, line: int, *, anew: bool = True) -> None:
        """The key is set in this line of the source; not anew: if no line is known of it."""
        if self.lines is not None and (anew or self.path not in self.lines):
            self.lines[self.path] = self.source, line

    def error(self, message: str, line: int | None = None) -> ScheduleError:
        return ScheduleError(self._message(message, line))

    def unfit(self, needed: str, value: Any) -> ScheduleError:
        return self.error(f"{needed}, not {shown(value)}")

    def unknown(self, known: Iterable[str]) -> UnknownKey:
        return UnknownKey(self._message(f"unknown key{nearest(self.path[-1], known)}"), self.path)

    def _message(self, message: str, line: int | None = None) -> str:
        source = self.source
        for length in range(len(self.path), 0, -1):  # the nearest key around it whose line is known
            if line is None:
                source, line = (self.lines or {}).get(self.path[:length], (source, None))
        where = source + (f", line {line}" if line and self.lines is not None else "")
        text = ": ".join([where, *([".".join(self.path)] if self.path else []), message])
        return text.encode("utf-8", "backslashreplace").decode()  # a key may hold what no terminal prints


def shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # whole numbers too long to print
        text = "so long a number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: object, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known word nearest to `word`, or the list of known words where none is
    near.
    """
    names = list(known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(names)}"
