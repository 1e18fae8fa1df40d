"""How many CPU threads a process computes with."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def set_threads(asked: int | None, device: str, local_world_size: int) -> None:
    """Give this process the number of threads asked for; without one, beside a CPU, its share of the cores.

    device: the type of the one computed on. local_world_size: processes on this machine.
    """
    if asked is not None:
        torch.set_num_threads(asked)
    elif device == "cpu":
        given = os.environ.get("OMP_NUM_THREADS")
        # torchrun sets OMP_NUM_THREADS=1 where nobody set it, which leaves most of a large machine idle.
        if local_world_size > 1 and given in (None, "1"):
            torch.set_num_threads(max(1, usable_cores() // local_world_size))
        elif given is None:  # PyTorch's own number knows no quota of a container
            torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def usable_cores() -> int:
    """CPU cores that this process may keep busy, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, _QUOTA.read_text().split())
        cores = min(cores, max(quota // period, 1))
    return cores


def crowding(local_world_size: int) -> str | None:
    """A warning where a CPU training has more threads than this machine has free cores."""
    cores, threads = usable_cores(), torch.get_num_threads()
    wanted, share = threads * local_world_size, max(cores // local_world_size, 1)
    if threads > share:
        return f"warning: {wanted} CPU threads for {cores} cores wait for each other: give --threads {share}"
    busy = os.getloadavg()[0]
    if threads > 1 and busy + wanted > len(os.sched_getaffinity(0)) + 1:
        return (
            f"warning: other programs keep about {busy:.0f} cores busy, and {threads} threads wait for the slowest of "
            "them in every operation: --threads 1 may be as fast"
        )
    return None
