"""The one error that a wrong schedule raises."""

import difflib
from collections.abc import Iterable


class ScheduleError(ValueError):
    """A schedule cannot be used; the message says what is wrong, where, and how to mend it."""


def nearest(word: object, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known word nearest to `word`, or the list of known words where none is
    near.
    """
    names = list(known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(names)}"
