"""Peak memory of a training step on the CPU: each variant in a process of its own, as the system counts it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import torch

import checkout  # noqa: F401
from benchmarks.steps import build_step
from benchmarks.variants import Variant, Work

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""proc(5), clear_refs: the peak resident set size becomes the present one."""


def peak_memory_on_cpu(variants: Iterable[Variant], work: Work) -> dict[str, float]:
    """GB that training steps add at their highest point to a process that has imported torch and read the batches.

    Weights, gradients, momentum, activations and workspace, and what the C library holds on to; without pages of
    program files. Empty where the system does not tell (it needs Linux).
    """
    if not _STATUS.exists():
        return {}
    threads = torch.get_num_threads()
    peaks = {}
    for variant in variants:
        # In one process, a variant would use what another has left behind.
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
        # The system may kill a process that takes too much: that one has no figure.
        with pool, contextlib.suppress(BrokenProcessPool):
            peaks[variant.name] = pool.submit(_bytes_added, variant, work, threads).result() / 2**30
    return peaks


def _bytes_added(variant: Variant, work: Work, threads: int) -> int:
    torch.set_num_threads(threads)
    memory = PeakMemory(work.device)
    step = build_step(variant, work)
    run = partial(step.train, work.batches)
    step.settle(run)
    # What happens once only, a compiler at work say, is over after a first run.
    run()
    memory.reset()
    run()
    return memory.bytes_added()


class PeakMemory:
    """Memory that this process has added at its highest point: resident memory without pages of program files, or what
    torch has allocated on a GPU. 0 where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = {} if device.type == "cuda" else _bytes_by_kind()

    def reset(self) -> None:
        """What was highest before does not count."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with contextlib.suppress(OSError):  # forbidden in some containers: then it counts after all
            _CLEAR_REFS.write_text(_RESET_PEAK)

    def bytes_added(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device)
        after = _bytes_by_kind()
        if not after:
            return 0
        read_from_files = after["RssFile"] - self._before["RssFile"]
        return after["VmHWM"] - self._before["VmRSS"] - read_from_files


def _bytes_by_kind() -> dict[str, int]:
    if not _STATUS.exists():
        return {}
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssFile")}
