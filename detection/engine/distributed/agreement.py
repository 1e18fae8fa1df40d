"""What one process finds out becomes known to all of them, before it has consequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from data import DataError
from detection.engine.distributed.comm import CONTROL_TIMEOUT, Processes
from detection.errors import DetectionError
from schedules import ScheduleError

USER_ERRORS = (DataError, DetectionError, ScheduleError)
"""The errors that are the user's to mend: shown as one message, without a traceback."""

T = TypeVar("T")


class RunError(DetectionError):
    """An error that every process of the run knows of; the main one shows it."""


def run_on_all_ranks(processes: Processes, action: Callable[[], T]) -> T:
    """Do `action` on every process; where it fails on any of them, every process raises the same RunError.

    `action` must not talk to other processes: one that failed would leave them waiting.
    """
    result, error = _attempt(action)
    return _agreed(result, processes.gather_objects(error))


def run_on_main_rank(processes: Processes, action: Callable[[], T]) -> T:
    """Do `action` on the main process; its result (plain types) or RunError on every process."""
    result, error = _attempt(action) if processes.is_main else (None, None)
    result, error = processes.broadcast((result, error))
    return _agreed(result, [error])


def run_on_each_node(processes: Processes, action: Callable[[], T]) -> T:
    """Do `action` on one process of each machine; its result (plain types) on every process there, or RunError on all.

    The others wait as long as for what the main process does alone.
    """
    result, error = _attempt(action) if processes.rank == processes.node_main else (None, None)
    with processes.waiting("what one process of each machine does alone", CONTROL_TIMEOUT):
        told = processes.gather_objects((result, error))
    return _agreed(told[processes.node_main][0], [error for _, error in told])


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    # The system's errors are the user's as well: a file that may not be read, a folder that is none.
    except (*USER_ERRORS, OSError) as error:
        return None, str(error)


def _agreed(result: T | None, errors: list[str | None]) -> T:
    messages = list(dict.fromkeys(error for error in errors if error is not None))
    if messages:
        raise RunError("\n".join(messages))
    return result  # type: ignore[return-value]
