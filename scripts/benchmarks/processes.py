"""What other processes have used: CPU-seconds and memory, as Linux tells them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

MB = 1e6


class Memory(NamedTuple):
    """Bytes of a process in memory."""

    rss: int
    pss: int
    """Shared pages counted by the part that is the process's: the sum over processes is what they take together"""
    private: int
    """Shared with nobody"""


def memory_of(pid: int | None) -> Memory | None:
    """None where the system does not tell (it needs Linux)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return Memory(fields["Rss"], fields["Pss"], fields["Private_Clean"] + fields["Private_Dirty"])


def cpu_seconds(pid: int) -> float:
    """CPU-seconds of all threads of a process, in user and kernel mode."""
    if pid == os.getpid():
        return time.process_time()
    # The clock id that clock_getcpuclockid(3) makes of a pid on Linux; /proc/PID/stat counts in steps of 10 ms.
    return time.clock_gettime((~pid << 3) | 2)
