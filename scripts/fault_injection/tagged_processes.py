"""Processes found again by a mark in their environment, which their children have too, whatever session they are in."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def marked_processes(variable: str, value: str) -> list[int]:
    """Process ids of everything that was started with variable=value, orphans included; needs Linux."""
    wanted = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def kill_marked(variable: str, value: str, patience: float = 30.0) -> None:
    """SIGKILL to all of them, until none is left or `patience` seconds are over."""
    until = time.monotonic() + patience
    while (left := marked_processes(variable, value)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
