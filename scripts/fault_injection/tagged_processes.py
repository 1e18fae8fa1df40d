"""Processes found again, with their children: by a tag in their environment, or by the session that they lead."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path


def tagged_processes(variable: str, value: str, sessions: Collection[int] = ()) -> list[int]:
    """Process ids of everything started with variable=value or in one of `sessions`, orphans included; needs Linux."""
    wanted = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            state, _, _, session = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            is_meant = int(folder.name) in sessions or int(session) in sessions
            # A zombie is left to its parent.
            if state != "Z" and (is_meant or wanted in (folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def kill_tagged(variable: str, value: str, sessions: Collection[int] = (), patience: float = 30.0) -> None:
    """SIGKILL to all of them, until none is left or `patience` seconds are over."""
    until = time.monotonic() + patience
    while (left := tagged_processes(variable, value, sessions)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
