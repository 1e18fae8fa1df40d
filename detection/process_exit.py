"""How a process ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """Ends this process with `status`; one among several at once, without clearing up Python first.

    gloo's threads let go of a collective's tensors some time after it is done, and need the interpreter for that. One
    that comes to it while the interpreter is being taken down aborts the process (seen with PyTorch 2.14 and Python
    3.11), and a run that has ended well counts as failed. Whatever must be closed is closed before.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):
            try:
                stream.flush()
            except OSError:
                # Whoever read it is gone, or the disk is full: Python would try again, and make a failure of it.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    # Python would wait for a child that does not end: a loader process whose disk does not answer.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not multiprocessing.active_children():
        sys.exit(status)
    os._exit(status)
